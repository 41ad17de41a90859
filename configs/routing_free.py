"""Routing-free MoE (arXiv 2604.00801): no router, no top K; an expert runs where its own gate passes a threshold.

    python train.py --config=configs/routing_free.py:tiny

A controller moves the weight of the balance loss until K experts run on a token, on average. Rank
as in `aoe.py`; one threshold an expert more.
"""

from ml_collections import ConfigDict

from configs import aoe


def get_config(size: str = "") -> ConfigDict:
    """Gates in place of probabilities."""
    config = aoe.get_config(size)
    config.model.router = "routing_free"
    config.losses.load_balance.weight = (
        1e-3  # at first; with 0.01 all fall silent before the controller acts
    )
    return config
