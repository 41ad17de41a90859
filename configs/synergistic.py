"""Synergistic losses (arXiv 2602.14159): chosen experts are excited differently, and paths through the layers are kept.

    python train.py --config=configs/synergistic.py:tiny

L_sp, the cosine of the chosen experts' hidden activations, and L_cp, the probabilities of the
chosen in adjacent layers, both on top of the balance loss.
"""

from ml_collections import ConfigDict

from configs import vanilla


def get_config(size: str = "") -> ConfigDict:
    """The published weights."""
    config = vanilla.get_config(size)
    config.losses.specialization.weight = 2e-3
    config.losses.path_coupling.weight = 1e-3
    return config
