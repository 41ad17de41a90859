"""ERC that trains the experts alone, the other reading of the paper's pseudocode.

python train.py --config=configs/ablations/detach_router.py:tiny
"""

from configs import erc


def get_config(size=""):
    """ERC with the router detached."""
    config = erc.get_config(size)
    config.losses.erc.detach_router = True
    return config
