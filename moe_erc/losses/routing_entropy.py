"""Entropy of top-p routing ("Harder tasks need more experts", arXiv 2403.07652).

    loss = mean_N - sum_e p_e log p_e

It is 0 when one expert is certain, and log E when all are alike. The loss keeps the number of
experts small: without it, a router that takes experts until their probabilities exceed p learns
flat probabilities, and takes all experts.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_erc.losses.base import Loss, Needs, NoOptions
from moe_erc.numerics import masked_mean


def routing_entropy(probabilities_BTE: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean entropy in nats of the unmasked tokens' router probabilities."""
    probabilities_BTE = jnp.asarray(probabilities_BTE, jnp.float32)
    # 0 log 0 is 0, and its slope is that of the smallest normal number.
    floor = jnp.finfo(jnp.float32).tiny
    log_BTE = jnp.log(jnp.maximum(probabilities_BTE, floor))
    return masked_mean(-jnp.sum(probabilities_BTE * log_BTE, axis=-1), mask_BT)


def compute(options: NoOptions, layer: Any) -> jax.Array:
    """The loss of a layer's probabilities."""
    return routing_entropy(layer.scores.probabilities_BTE, layer.mask_BT)


LOSS = Loss(kind="layer", compute=compute, needs=Needs("has_probabilities", "reads probabilities"))
