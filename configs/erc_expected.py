"""ERC with the noise integrated out: the same expected squares, no draw.

python train.py --config=configs/erc_expected.py:tiny
"""

from ml_collections import ConfigDict

from configs import erc


def get_config(size: str = "") -> ConfigDict:
    """ERC with expected noise."""
    config = erc.get_config(size)
    config.losses.erc.noise = "expected"
    return config
