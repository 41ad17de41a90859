"""Expert-router coupling (ERC, arXiv 2512.23447): vanilla plus an E x E loss on parameters.

The loss reads the router's rows and the experts' gate matrices.

    python train.py --config=configs/erc.py:tiny

Claim of the paper: at 3B, 500B tokens, about 56.4 against 55.7 average accuracy, for 0.2 to 0.8 %
of the step. What a run at tiny reaches: docs/results.md.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "") -> ConfigDict:
    """Weight 1 and alpha 1, the paper's at E = 64; alpha 0.5, its best at E = 256."""
    config = base.get_config(size)
    config.losses.erc.weight = 1.0
    config.losses.erc.alpha = 0.5 if config.model.experts >= 256 else 1.0
    return config
