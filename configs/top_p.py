"""Top-p routing ("Harder tasks need more experts", arXiv 2403.07652): as many experts as reach a probability together.

    python train.py --config=configs/top_p.py:tiny

The smallest prefix of the most probable whose sum exceeds 0.4, of at most 2 K, and an entropy loss
that keeps it short. FLOPs are counted at 2 K; `router/experts_per_token` says how many ran.
"""

from ml_collections import ConfigDict

from configs import vanilla


def get_config(size: str = "") -> ConfigDict:
    """Threshold 0.4, entropy loss 1e-4."""
    config = vanilla.get_config(size)
    config.routers.softmax.top_p = 0.4
    config.model.experts_per_token = min(2 * config.model.experts_per_token, config.model.experts)
    config.losses.routing_entropy.weight = 1e-4
    return config
