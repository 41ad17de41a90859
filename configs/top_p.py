"""Top-p routing ("Harder tasks need more experts", arXiv 2403.07652).

A token has as many experts as together reach a probability.

    python train.py --config=configs/top_p.py:tiny

They are the smallest prefix of the most probable experts whose sum exceeds 0.4, and at most 2 K. An
entropy loss keeps the prefix short. FLOPs are counted at 2 K; `router/experts_per_token` says how
many experts ran.
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
