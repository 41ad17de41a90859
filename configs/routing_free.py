"""Routing-free MoE (arXiv 2604.00801): an expert runs where its own gate passes a threshold.

There is no router and no top K.

    python train.py --config=configs/routing_free.py:tiny

A controller moves the weight of the balance loss until K experts run on a token, on average. The
rank is that of `aoe.py`; every expert has a threshold besides.
"""

from ml_collections import ConfigDict

from configs import aoe


def get_config(size: str = "") -> ConfigDict:
    """Gates in place of probabilities."""
    config = aoe.get_config(size)
    config.model.router = "routing_free"
    # The weight at first. With 0.01, all experts fall silent before the controller acts.
    config.losses.load_balance.weight = 1e-3
    return config
