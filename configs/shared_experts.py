"""Shared experts (DeepSeekMoE, arXiv 2401.06066): one of a token's K experts serves all tokens.

    python train.py --config=configs/shared_experts.py:tiny

Claim of the paper: routed experts need not each learn what all tokens need.

With K - 1 routed experts and 1 shared one, active parameters and FLOPs are vanilla's. The experts
have 1 / E more parameters in all, because E stays as it is, so that it divides over a mesh.
--config.model.experts=63 in place of 64 gives vanilla's number of parameters.
"""

from ml_collections import ConfigDict

from configs import vanilla


def get_config(size: str = "") -> ConfigDict:
    """One shared expert in place of a routed one."""
    config = vanilla.get_config(size)
    config.model.shared_experts = 1
    config.model.experts_per_token -= 1
    return config
