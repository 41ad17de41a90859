"""Shared experts and ERC.

python train.py --config=configs/combinations/erc_shared_experts.py:tiny
"""

from ml_collections import ConfigDict

from configs import shared_experts


def get_config(size: str = "") -> ConfigDict:
    """`shared_experts.py` and the ERC loss."""
    config = shared_experts.get_config(size)
    config.losses.erc.weight = 1.0
    return config
