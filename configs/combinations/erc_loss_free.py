"""Loss-free balancing and ERC.

python train.py --config=configs/combinations/erc_loss_free.py:tiny
"""

from ml_collections import ConfigDict

from configs import loss_free


def get_config(size: str = "") -> ConfigDict:
    """`loss_free.py` and the ERC loss."""
    config = loss_free.get_config(size)
    config.losses.erc.weight = 1.0
    return config
