"""ERC on the clean router rows: is the perturbation needed?

python train.py --config=configs/ablations/no_noise.py:tiny
"""

from configs import erc


def get_config(size=""):
    """ERC with no noise."""
    config = erc.get_config(size)
    config.losses.erc.noise = "none"
    return config
