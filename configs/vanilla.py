"""Vanilla MoE: top-K softmax router and load-balancing loss, the baseline of every method.

    python train.py --config=configs/vanilla.py:tiny

At tiny (2 CPU cores, 146 s, one seed): validation loss 1.905, ERC 0.032 to 0.074 by layer.
"""

from configs import base


def get_config(size=""):
    """The base config as it is."""
    return base.get_config(size)
