"""ERC with looser or stricter coupling; sweep alpha in 0 ... 5 (here 0.5).

python train.py --config=configs/ablations/alpha.py:tiny --config.losses.erc.alpha=0.8
"""

from ml_collections import ConfigDict

from configs import erc


def get_config(size: str = "") -> ConfigDict:
    """ERC with a stricter alpha."""
    config = erc.get_config(size)
    config.losses.erc.alpha = 0.5
    return config
