"""Vanilla MoE: top-K softmax router and load-balancing loss, the baseline of every method.

    python train.py --config=configs/vanilla.py:tiny

What a run at tiny reaches: docs/results.md.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "") -> ConfigDict:
    """The base config as it is."""
    return base.get_config(size)
