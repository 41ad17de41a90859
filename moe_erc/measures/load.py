"""How evenly the experts of a layer are loaded, from their shares of its assignments.

times the mean    E share_e        1 when balanced, E when one expert takes everything
MaxVio            max_e E share_e - 1                                            (arXiv 2408.15664)
load entropy      sum_e share_e log(1 / share_e) / log E        1 when even, and for E = 1
dead experts      the share of experts without any assignment
load pQ           the Q-th percentile over experts of E share_e, interpolated
"""

import functools
import math

import jax
import jax.numpy as jnp

from moe_erc.measures.base import Measure
from moe_erc.numerics import divide

PERCENTILES = (5, 50, 95)


def shares(load_LE: jax.Array) -> jax.Array:
    """Counts or shares as shares that sum to 1, float32, (L, E); a layer of zeros is even."""
    load_LE = jnp.asarray(load_LE)
    # The total of counts is an integer: float32 would round it from 2^24 on.
    total_L1 = jnp.sum(load_LE, axis=-1, keepdims=True)
    return jnp.where(total_L1 > 0, divide(load_LE, total_L1), 1 / load_LE.shape[-1])


def _max_load(share_LE):
    return share_LE.shape[-1] * jnp.max(share_LE, axis=-1)


def _min_load(share_LE):
    return share_LE.shape[-1] * jnp.min(share_LE, axis=-1)


def _max_violation(share_LE):
    return _max_load(share_LE) - 1


def _load_entropy(share_LE):
    experts = share_LE.shape[-1]
    surprise_LE = jnp.log(1 / jnp.where(share_LE > 0, share_LE, 1))  # 0 log 0 is 0
    entropy_L = jnp.sum(share_LE * surprise_LE, axis=-1)
    return entropy_L / math.log(experts) if experts > 1 else jnp.ones_like(entropy_L)


def _dead_experts(share_LE):
    return jnp.mean(share_LE == 0, axis=-1)


def _percentile(share_LE, percent):
    return share_LE.shape[-1] * jnp.percentile(share_LE, percent, axis=-1)


def _at_percentile(percent):
    compute = functools.partial(_percentile, percent=percent)
    return Measure(
        f"router/load_p{percent}", f"load p{percent}", "times the mean", True, compute, reads="load"
    )


# (L, E), of validation text
LOAD = Measure("router/load", "load", "share of assignments", per_layer=True)
EXPERTS_PER_TOKEN = Measure("router/experts_per_token", "experts per token", "", per_layer=True)
MAX_LOAD = Measure(
    "router/max_load", "highest load", "times the mean", True, _max_load, "lower", "load"
)
MIN_LOAD = Measure(
    "router/min_load", "lowest load", "times the mean", True, _min_load, "higher", "load"
)
LOAD_ENTROPY = Measure(
    "router/load_entropy", "load entropy", "share of log E", True, _load_entropy, "higher", "load"
)
MAX_VIOLATION = Measure("router/max_violation", "MaxVio", "", True, _max_violation, "lower", "load")
DEAD_EXPERTS = Measure(
    "router/dead_experts", "dead experts", "share of experts", True, _dead_experts, "lower", "load"
)

MEASURES = (
    LOAD, EXPERTS_PER_TOKEN, MAX_LOAD, MIN_LOAD, *map(_at_percentile, PERCENTILES),
    LOAD_ENTROPY, MAX_VIOLATION, DEAD_EXPERTS,
)  # fmt: skip
