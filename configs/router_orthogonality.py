"""Router orthogonality (ERNIE 4.5; Figure 6c of the ERC paper): router rows are drawn apart.

The experts have no part in it.

    python train.py --config=configs/router_orthogonality.py:tiny

Claim of the ERC paper: it helps a vanilla router and adds nothing to ERC, which is not about the
rows alone. `router_orthogonality_decoupled.py` is ERNIE's own recipe.
"""

from ml_collections import ConfigDict

from configs import vanilla


def get_config(size: str = "") -> ConfigDict:
    """Weight 1e-2."""
    config = vanilla.get_config(size)
    config.losses.router_orthogonality.weight = 1e-2
    return config
