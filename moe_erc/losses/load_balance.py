"""Load-balancing loss of the Switch Transformer, normalised as in the code OLMoE was trained with.

loss = E / (N K) sum_e count_e mean_prob_e        1 when balanced, E / K when K experts take everything

N K stands for the actual number of assignments: under top-p, where tokens have different numbers of experts, the loss
is 1 when balanced as well. Counts are integers of unmasked tokens, added over devices, and with scope "step" over the
step's earlier micro-batches and this one. They are divided once, by their total.

mean_prob is the micro-batch's own, and its loss counts by its share of the step's unmasked tokens. So mean_prob adds
up to that of the whole batch, under any routing: where the loads are alike, so is the loss. A step of several
micro-batches differs from the whole batch by the loads alone: the last sees all counts, an earlier one those so far.
"""

import jax
import jax.numpy as jnp
from jax import lax


def load(assignments_LE: jax.Array) -> jax.Array:
    """Shares of every layer's assignments, float32; zeros for a layer without any."""
    return assignments_LE / jnp.maximum(jnp.sum(assignments_LE, axis=-1, keepdims=True), 1)


def load_balance(load_LE, probability_LE):
    """Mean over layers of E <load, probability>; load is constant, the gradient flows through probability."""
    experts = load_LE.shape[-1]
    return experts * jnp.mean(jnp.sum(lax.stop_gradient(load_LE) * probability_LE, axis=-1))
