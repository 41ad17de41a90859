"""Sigmoid gates with a balancing bias, and ERC.

python train.py --config=configs/combinations/erc_sigmoid.py:tiny
"""

from ml_collections import ConfigDict

from configs import sigmoid


def get_config(size: str = "") -> ConfigDict:
    """`sigmoid.py` and the ERC loss."""
    config = sigmoid.get_config(size)
    config.losses.erc.weight = 1.0
    return config
