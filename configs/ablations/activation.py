"""ERC on another activation of the expert: up, silu_gate, swiglu or output (here swiglu).

python train.py --config=configs/ablations/activation.py:tiny --config.losses.erc.activation=output
"""

from ml_collections import ConfigDict

from configs import erc


def get_config(size: str = "") -> ConfigDict:
    """ERC with another activation."""
    config = erc.get_config(size)
    config.losses.erc.activation = "swiglu"
    return config
