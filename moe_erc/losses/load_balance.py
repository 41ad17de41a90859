"""Load-balancing loss of the Switch Transformer, normalised as in the code OLMoE was trained with.

loss = E / (N K) sum_e count_e mean_prob_e        1 when balanced, E / K when K experts take everything
"""

import math

import jax.numpy as jnp
from jax import lax


def load_balance(load_LE, probability_LE):
    """Mean over layers of E <load, probability>; load is constant, the gradient flows through probability."""
    experts = load_LE.shape[-1]
    return experts * jnp.mean(jnp.sum(lax.stop_gradient(load_LE) * probability_LE, axis=-1))


def load_measures(load_LE):
    """How even the load of every layer is, by name; `load_LE` may be shares or counts, and a layer of zeros is even.

    max_load is the highest share over the mean share, max_violation (MaxVio, arXiv 2408.15664) what it exceeds 1 by;
    load_entropy is that of the shares over log E, 1 when even (and for E = 1), 0 when one expert takes everything.
    """
    load_LE = jnp.asarray(load_LE, jnp.float32)
    experts, total_L1 = load_LE.shape[-1], jnp.sum(load_LE, axis=-1, keepdims=True)
    share_LE = jnp.where(total_L1 > 0, load_LE / jnp.where(total_L1 > 0, total_L1, 1), 1 / experts)
    max_load_L = experts * jnp.max(share_LE, axis=-1)
    entropy_L = jnp.sum(share_LE * jnp.log(1 / jnp.where(share_LE > 0, share_LE, 1)), axis=-1)  # 0 log 0 is 0
    return {
        "router/max_load": max_load_L,
        "router/load_entropy": entropy_L / math.log(experts) if experts > 1 else jnp.ones_like(entropy_L),
        "router/max_violation": max_load_L - 1,
    }
