"""Shared experts and ERC.

python train.py --config=configs/combinations/erc_shared_experts.py:tiny
"""

from configs import shared_experts


def get_config(size=""):
    """`shared_experts.py` and the ERC loss."""
    config = shared_experts.get_config(size)
    config.losses.erc.weight = 1.0
    return config
