"""Routing: which K of the E experts a token meets, and with what weight; one function per router.

probs = softmax(scores_E) in float32,   experts = top K of probs,   y = sum_k probs[k] expert_k(x)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Routing(NamedTuple):
    """The experts chosen for every token, most probable first, and their weights."""

    weights_BTK: jax.Array  # float32
    experts_BTK: jax.Array  # int32


class RoutingStats(NamedTuple):
    """What the losses need of a layer's routing, reduced before layers are stacked."""

    load_E: jax.Array  # share of all assignments that went to expert e; sums to 1
    probability_E: jax.Array  # mean router probability of expert e; sums to 1
    logsumexp2: jax.Array  # mean squared logsumexp of the scores


def top_k(scores_BTE, experts_per_token, renormalize):
    """The K most probable experts weighed by their probability over all E, or over the chosen K if `renormalize`."""
    weights_BTK, experts_BTK = lax.top_k(jax.nn.softmax(scores_BTE, axis=-1), experts_per_token)
    if renormalize:
        weights_BTK /= jnp.sum(weights_BTK, axis=-1, keepdims=True)
    return Routing(weights_BTK, experts_BTK)


def statistics(scores_BTE, routing, mask_BT):
    """Means over the unmasked tokens of the whole batch (all devices: this is called outside `shard_map`)."""
    experts, experts_per_token = scores_BTE.shape[-1], routing.experts_BTK.shape[-1]
    share_BT = mask_BT / jnp.maximum(jnp.sum(mask_BT), 1)
    share_BTK = jnp.broadcast_to(share_BT[..., None] / experts_per_token, routing.experts_BTK.shape)
    return RoutingStats(
        load_E=jnp.zeros(experts).at[routing.experts_BTK].add(share_BTK),
        probability_E=jnp.einsum("bte,bt->e", jax.nn.softmax(scores_BTE, axis=-1), share_BT),
        logsumexp2=jnp.sum(jax.nn.logsumexp(scores_BTE, axis=-1) ** 2 * share_BT),
    )
