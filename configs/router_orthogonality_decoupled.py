"""Router orthogonality as ERNIE 4.5 was trained with it: a descent step of its own.

The step has no learning rate and no moments.

    python train.py --config=configs/router_orthogonality_decoupled.py:tiny

After the optimizer's update: router -= weight * gradient of the loss there.
"""

from ml_collections import ConfigDict

from configs import router_orthogonality


def get_config(size: str = "") -> ConfigDict:
    """Outside the optimizer."""
    config = router_orthogonality.get_config(size)
    config.losses.router_orthogonality.decoupled = True
    return config
