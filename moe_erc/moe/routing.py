"""Routing: which experts a token meets, and with what weight. The routers are in `routers/`.

A router scores every expert for every token; the K most preferred are chosen and weighed by their
probability:

    probs   = softmax(scores_E) in float32
    experts = top K of probs + bias
    y       = sum_k probs[k] expert_k(x)

The bias is that of loss-free balancing (arXiv 2408.15664). With top_p < 1 (arXiv 2403.07652) only
the smallest prefix of the K whose probabilities sum to more than top_p is kept. A slot left empty
has expert id E and weight 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.numerics import divide


class Scores(NamedTuple):
    """What a router says of every token and expert, float32."""

    logits_BTE: jax.Array  # before the normalisation; the router z-loss keeps these small
    probabilities_BTE: jax.Array  # experts are chosen and weighed by these
    # What the load-balancing loss reads; of most routers the probabilities.
    balance_BTE: jax.Array
    low_BTEr: jax.Array | None = None  # what an expert with a factorised gate goes on from


class Routing(NamedTuple):
    """The experts chosen for every token, most preferred first, and their weights."""

    weights_BTK: jax.Array  # float32
    experts_BTK: jax.Array  # int32; E in an empty slot


class RoutingStats(NamedTuple):
    """What losses and measures need of a layer's routing, reduced before layers are stacked.

    Loads are counts: those of micro-batches, devices and evaluation batches add up exactly, and are
    divided once, by their total. Means are over the unmasked tokens; means of micro-batches are
    combined by their shares of these tokens.
    """

    assignments_E: jax.Array  # int32: how many unmasked tokens expert e was assigned to
    tokens: jax.Array  # int32: unmasked tokens
    probability_E: jax.Array  # mean router probability of expert e; sums to 1
    logsumexp2: jax.Array  # mean squared logsumexp of the logits


class StepCounts(NamedTuple):
    """Where the unmasked tokens of a step went, int32; those of micro-batches add up."""

    assignments_LE: jax.Array
    tokens: jax.Array

    @property
    def experts_per_token_L(self) -> jax.Array:
        """Mean number of experts of a token, float32."""
        return divide(jnp.sum(self.assignments_LE, axis=-1), self.tokens)


def top(
    probabilities_BTE: jax.Array,
    preference_BTE: jax.Array,
    experts_per_token: int,
    top_p: float = 1.0,
    renormalize: bool = False,
) -> Routing:
    """The K most preferred experts, weighed by their probability.

    top_p: below 1, only the smallest prefix of the K whose probabilities sum to more than it.
    renormalize: whether the weights are divided by their sum over the chosen experts.
    """
    experts = probabilities_BTE.shape[-1]
    experts_BTK = lax.top_k(lax.stop_gradient(preference_BTE), experts_per_token)[1]
    weights_BTK = jnp.take_along_axis(probabilities_BTE, experts_BTK, axis=-1)
    if top_p < 1:
        before_BTK = jnp.cumsum(weights_BTK, axis=-1) - weights_BTK
        # `~(… > …)` rather than `<=`: it is true of NaN, which then shows in the weights.
        needed_BTK = ~(before_BTK > top_p)
        weights_BTK = jnp.where(needed_BTK, weights_BTK, 0)
        experts_BTK = jnp.where(needed_BTK, experts_BTK, experts)
    if renormalize:
        weights_BTK = shares(weights_BTK)
    return Routing(weights_BTK, experts_BTK)


def shares(weights_BTK: jax.Array) -> jax.Array:
    """Weights over their sum; 0 if all are 0.

    All are 0 where a bias chose experts whose probabilities are 0.
    """
    # Divided by the largest first: for a sum of 1e-20 the derivative of the quotient is beyond
    # float32's range.
    largest_BT1 = lax.stop_gradient(jnp.max(weights_BTK, axis=-1, keepdims=True))
    weights_BTK = divide(weights_BTK, largest_BT1)
    return divide(weights_BTK, jnp.sum(weights_BTK, axis=-1, keepdims=True))


def even(probabilities_BTE: jax.Array, experts_per_token: int) -> Routing:
    """K experts of every token so that all experts are met equally often, whatever the router says.

    Token n takes the experts n K, n K + 1, ..., n K + K - 1, modulo E, weighed by their
    probability. Loads are equal where E divides B T K.
    """
    batch, length, experts = probabilities_BTE.shape
    tokens_BT1 = jnp.arange(batch * length, dtype=jnp.int32).reshape(batch, length, 1)
    slots_K = jnp.arange(experts_per_token, dtype=jnp.int32)
    experts_BTK = (experts_per_token * tokens_BT1 + slots_K) % experts
    return Routing(jnp.take_along_axis(probabilities_BTE, experts_BTK, axis=-1), experts_BTK)


def full_slots(routing: Routing, experts: int, mask_BT: jax.Array) -> jax.Array:
    """The slots that hold an expert, of unmasked tokens, (B, T, K) bool."""
    return (routing.experts_BTK < experts) & mask_BT[..., None]


def statistics(scores: Scores, routing: Routing, mask_BT: jax.Array) -> RoutingStats:
    """The statistics of the unmasked tokens of the whole batch, on all devices.

    They are global because this function is called outside `shard_map`. Assignments are added as
    integers: a float32 sum of 1 / N loses 0.3 % of 3 million. An int32 holds 2^31 - 1 of them per
    layer; `ModelConfig.check_assignments` refuses a step of more.
    """
    experts = scores.balance_BTE.shape[-1]
    tokens = jnp.sum(mask_BT, dtype=jnp.int32)
    share_BT = divide(mask_BT, tokens)
    full_BTK = full_slots(routing, experts, mask_BT)
    # Compared and summed in one pass. A scatter-add would queue all assignments at E addresses: on
    # an H100 that took 1.2 ms a layer at 262,144 of them.
    is_expert_BTKE = routing.experts_BTK[..., None] == jnp.arange(experts)
    assigned_BTKE = is_expert_BTKE & full_BTK[..., None]
    assignments_E = jnp.sum(assigned_BTKE, axis=(0, 1, 2), dtype=jnp.int32)
    # In the highest precision: a TPU would round 1 / N to bfloat16, and the mean with it, by up to
    # 0.4 %.
    probability_E = jnp.einsum(
        "bte,bt->e", scores.balance_BTE, share_BT, precision=lax.Precision.HIGHEST
    )
    logsumexp2_BT = jax.nn.logsumexp(scores.logits_BTE, axis=-1) ** 2
    return RoutingStats(assignments_E, tokens, probability_E, jnp.sum(logsumexp2_BT * share_BT))
