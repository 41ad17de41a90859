"""Autonomy-of-Experts (arXiv 2501.13074): a token meets the experts that it excites most.

There is no router: the first factor of an expert's own gate scores the token.

    python train.py --config=configs/aoe.py:tiny

Claim of the ERC paper: the best of its comparison, about 56.7 average accuracy against ERC's 56.4
and vanilla's 55.7, for 1.6 times the training time and 1.3 times the memory.

The default rank is r = D F / (D + F), rounded down: an expert has as many parameters as with a
whole gate. --config.routers.aoe.renormalize gives the weights of the paper's Algorithm 2, a softmax
over the chosen K.
"""

from ml_collections import ConfigDict

from configs import vanilla


def get_config(size: str = "") -> ConfigDict:
    """Factorised gates that score for themselves."""
    config = vanilla.get_config(size)
    config.model.router = "aoe"
    return config
