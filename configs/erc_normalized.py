"""Scale-invariant ERC: shrinking router or gate no longer lowers the loss.

python train.py --config=configs/erc_normalized.py:tiny
"""

from ml_collections import ConfigDict

from configs import erc


def get_config(size: str = "") -> ConfigDict:
    """ERC with normalised hinges."""
    config = erc.get_config(size)
    config.losses.erc.normalize = True
    return config
