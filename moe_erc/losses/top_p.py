"""Entropy of top-p routing ("Harder tasks need more experts", arXiv 2403.07652): keeps the number of experts small.

    loss = mean_N - sum_e p_e log p_e        0 when one expert is certain, log E when all are alike

Without it a router that takes experts until their probabilities exceed p learns flat ones, and takes them all.
"""

import jax.numpy as jnp


def routing_entropy(probabilities_BTE, mask_BT):
    """Mean entropy in nats of the unmasked tokens' router probabilities."""
    probabilities_BTE = jnp.asarray(probabilities_BTE, jnp.float32)
    floor = jnp.finfo(jnp.float32).tiny  # 0 log 0 is 0, and its slope that of the smallest normal number
    entropy_BT = -jnp.sum(probabilities_BTE * jnp.log(jnp.maximum(probabilities_BTE, floor)), axis=-1)
    return jnp.sum(entropy_BT * mask_BT) / jnp.maximum(jnp.sum(mask_BT), 1)
