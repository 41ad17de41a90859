"""CompeteSMoE (v2, arXiv 2505.13380): the router learns which experts win a competition.

On some steps all experts of a layer run, and those with the strongest answers win.

    python train.py --config=configs/competesmoe.py:tiny

A layer competes with probability 0.07, and at most 3 layers do on one step. A layer that competes
computes all experts, and that price is part of the comparison.
"""

from ml_collections import ConfigDict

from configs import vanilla


def get_config(size: str = "") -> ConfigDict:
    """Now and then experts compete."""
    config = vanilla.get_config(size)
    config.model.router = "competition"
    config.losses.competition.weight = 1e-3
    return config
