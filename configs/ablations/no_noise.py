"""ERC on the clean router rows: is the perturbation needed?

python train.py --config=configs/ablations/no_noise.py:tiny
"""

from ml_collections import ConfigDict

from configs import erc


def get_config(size: str = "") -> ConfigDict:
    """ERC with no noise."""
    config = erc.get_config(size)
    config.losses.erc.noise = "none"
    return config
