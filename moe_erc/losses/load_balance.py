"""Load-balancing loss of the Switch Transformer, normalised as in the code OLMoE was trained with.

loss = E / (N K) sum_e count_e mean_prob_e        1 when balanced, E / K when K experts take everything
"""

import jax.numpy as jnp
from jax import lax


def load_balance(load_LE, probability_LE):
    """Mean over layers of E <load, probability>; load is constant, the gradient flows through probability."""
    experts = load_LE.shape[-1]
    return experts * jnp.mean(jnp.sum(lax.stop_gradient(load_LE) * probability_LE, axis=-1))
