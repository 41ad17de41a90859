"""Expert orthogonality and routing variance (arXiv 2505.22323, NeurIPS 2025 oral).

Chosen experts answer differently, and the router decides clearly.

    python train.py --config=configs/expert_orthogonality.py:tiny

Claim of the paper: up to 23.8 % over an auxiliary-loss baseline on its tasks. The paper names no
coefficients; here they are 1e-3 each. The released code has others, and other losses:
ablations/expert_orthogonality_released.py.
"""

from ml_collections import ConfigDict

from configs import vanilla


def get_config(size: str = "") -> ConfigDict:
    """L_o on the experts' outputs, L_v on the router's weights."""
    config = vanilla.get_config(size)
    config.losses.output_overlap.weight = 1e-3
    config.losses.routing_variance.weight = 1e-3
    return config
