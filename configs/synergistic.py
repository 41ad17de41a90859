"""Synergistic losses (arXiv 2602.14159): chosen experts differ, and paths through layers stay.

    python train.py --config=configs/synergistic.py:tiny

L_sp is the cosine of the chosen experts' hidden activations. L_cp is made of the probabilities of
the chosen experts in adjacent layers. Both are added to the balance loss.
"""

from ml_collections import ConfigDict

from configs import vanilla


def get_config(size: str = "") -> ConfigDict:
    """The published weights."""
    config = vanilla.get_config(size)
    config.losses.specialization.weight = 2e-3
    config.losses.path_coupling.weight = 1e-3
    return config
