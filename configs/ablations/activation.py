"""ERC on another activation of the expert: up, silu_gate, swiglu or output (here swiglu).

python train.py --config=configs/ablations/activation.py:tiny --config.losses.erc.activation=output
"""

from configs import erc


def get_config(size=""):
    """ERC with another activation."""
    config = erc.get_config(size)
    config.losses.erc.activation = "swiglu"
    return config
