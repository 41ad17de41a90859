"""Sigmoid gates with a balancing bias, as DeepSeek-V3 routes (arXiv 2412.19437).

    python train.py --config=configs/sigmoid.py:tiny

Claim of the paper: balance without the harm that a balance loss does to the model. The bias moves
by 1e-3 a step towards equal load, outside the gradient. The paper's balance loss within a sequence,
of weight 1e-4, is left out.
"""

from ml_collections import ConfigDict

from configs import vanilla


def get_config(size: str = "") -> ConfigDict:
    """A sigmoid router whose bias takes the place of the balance loss."""
    config = vanilla.get_config(size)
    config.model.router = "sigmoid"
    config.routers.sigmoid.bias_rate = 1e-3
    config.losses.load_balance.weight = 0.0
    return config
