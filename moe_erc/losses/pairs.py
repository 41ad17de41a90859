"""Ordered pairs of the experts that one token chose, and the inner products of what they gave it.

    gram[j, k] = <v_j, v_k>,   pairs (j, k) with j != k, both chosen

A loss on pairs needs K x K numbers per token of vectors of width D. No array is (B, T, K, K, D).

Under accumulation the mean is over a micro-batch's own pairs, and the micro-batch is weighed by its
unmasked tokens. Where every token has K experts, the result is the mean of the whole batch. Under
top-p and routing-free, tokens have different numbers of pairs, and it is not: the number of pairs
in the step is not known when the gradient of its first micro-batch is taken.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.numerics import masked_mean


def gram(vectors_BTKD: jax.Array) -> jax.Array:
    """<v_j, v_k> of every two slots of a token, (B, T, K, K), summed in float32."""
    return jnp.einsum(
        "btjd,btkd->btjk",
        vectors_BTKD,
        vectors_BTKD,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def squared_lengths(gram_BTKK: jax.Array) -> jax.Array:
    """<v_k, v_k>, (B, T, K)."""
    return jnp.diagonal(gram_BTKK, axis1=-2, axis2=-1)


def mean_over_pairs(values_BTKK: jax.Array, chosen_BTK: jax.Array) -> jax.Array:
    """Mean of values[j, k] over the ordered pairs of all tokens; 0 where there is no pair."""
    other_KK = ~jnp.eye(chosen_BTK.shape[-1], dtype=bool)
    pair_BTKK = chosen_BTK[..., :, None] & chosen_BTK[..., None, :] & other_KK
    return masked_mean(values_BTKK, pair_BTKK)
