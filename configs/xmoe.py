"""X-MoE (arXiv 2204.09179): a cosine router in E / 2 dimensions, against collapse.

Its temperature is learned.

    python train.py --config=configs/xmoe.py:tiny

Its router has E D / 2 + E^2 / 2 + 1 parameters where vanilla has E D; the rest is the same.
"""

from ml_collections import ConfigDict

from configs import vanilla


def get_config(size: str = "") -> ConfigDict:
    """A cosine router."""
    config = vanilla.get_config(size)
    config.model.router = "xmoe"
    return config
