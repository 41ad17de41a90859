"""Shared experts (DeepSeekMoE, arXiv 2401.06066): one of the K experts of a token is the same for all tokens.

    python train.py --config=configs/shared_experts.py:tiny

Claim of the paper: routed experts need not each learn what all tokens need. Active parameters and
FLOPs are vanilla's, K - 1 routed and 1 shared. Experts have 1 / E more parameters in all: E stays,
so that it divides over a mesh; --config.model.experts=63 for 64 matches them.
"""

from ml_collections import ConfigDict

from configs import vanilla


def get_config(size: str = "") -> ConfigDict:
    """One shared expert in place of a routed one."""
    config = vanilla.get_config(size)
    config.model.shared_experts = 1
    config.model.experts_per_token -= 1
    return config
