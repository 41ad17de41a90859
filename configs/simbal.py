"""SimBal (arXiv 2506.14038): balance from an orthogonal router alone, no balance loss.

    python train.py --config=configs/simbal.py:tiny

Claim of the paper: similar tokens stay with the same experts, and training converges faster. The
weight is not published: 1e-1.
"""

from ml_collections import ConfigDict

from configs import vanilla


def get_config(size: str = "") -> ConfigDict:
    """Orthonormal rows, kept so."""
    config = vanilla.get_config(size)
    config.routers.softmax.init = "orthogonal"
    config.losses.simbal.weight = 0.1
    config.losses.load_balance.weight = 0.0
    return config
