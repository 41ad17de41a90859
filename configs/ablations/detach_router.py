"""ERC that trains the experts alone, the other reading of the paper's pseudocode.

python train.py --config=configs/ablations/detach_router.py:tiny
"""

from ml_collections import ConfigDict

from configs import erc


def get_config(size: str = "") -> ConfigDict:
    """ERC with the router detached."""
    config = erc.get_config(size)
    config.losses.erc.detach_router = True
    return config
