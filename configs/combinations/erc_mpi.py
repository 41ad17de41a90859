"""MPI and ERC.

    python train.py --config=configs/combinations/erc_mpi.py:tiny

The proxies are MPI's turned rows, which route; the gradient reaches router and gate through both.
"""

from ml_collections import ConfigDict

from configs import mpi


def get_config(size: str = "") -> ConfigDict:
    """`mpi.py` and the ERC loss."""
    config = mpi.get_config(size)
    config.losses.erc.weight = 1.0
    return config
