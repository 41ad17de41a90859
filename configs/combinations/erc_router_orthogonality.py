"""Router orthogonality and ERC.

python train.py --config=configs/combinations/erc_router_orthogonality.py:tiny
"""

from ml_collections import ConfigDict

from configs import router_orthogonality


def get_config(size: str = "") -> ConfigDict:
    """`router_orthogonality.py` and the ERC loss."""
    config = router_orthogonality.get_config(size)
    config.losses.erc.weight = 1.0
    return config
