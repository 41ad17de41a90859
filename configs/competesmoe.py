"""CompeteSMoE (v2, arXiv 2505.13380): on some steps all experts run and the strongest answers win;
the router learns who they are.

    python train.py --config=configs/competesmoe.py:tiny

Dense in the layers that compete, each with probability 0.07 and at most 3 a step: the price is the
point.
"""

from ml_collections import ConfigDict

from configs import vanilla


def get_config(size: str = "") -> ConfigDict:
    """Now and then experts compete."""
    config = vanilla.get_config(size)
    config.model.router = "competition"
    config.losses.competition.weight = 1e-3
    return config
