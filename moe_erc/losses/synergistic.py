"""Synergistic losses (arXiv 2602.14159): experts that differ on a token, and paths of experts from layer to layer.

    L_sp = mean over tokens and ordered pairs of chosen experts of cos(h_j, h_k),   h after the SwiGLU product
    L_cp = - mean_N sum over chosen e of layer l, chosen v of layer l + 1 of p[l, e] p[l + 1, v]

The double sum of L_cp is a product of two sums: of each layer it needs one number a token. It is a mean over the L - 1
pairs of adjacent layers.
"""

import jax.numpy as jnp

from moe_erc.losses.erc import root
from moe_erc.losses.pairs import gram, mean_over_pairs, squared_lengths


def specialization(hidden_BTKF, chosen_BTK):
    """L_sp of one layer; 0 where no token chose two experts. `chosen_BTK` is a bool, `hidden_BTKF` finite everywhere.

    The cosine with an all-zero vector is 0, and so is its gradient.
    """
    gram_BTKK = gram(hidden_BTKF)
    length_BTK = root(squared_lengths(gram_BTKK))
    inverse_BTK = jnp.where(length_BTK > 0, 1 / jnp.where(length_BTK > 0, length_BTK, 1), 0)
    return mean_over_pairs(gram_BTKK * inverse_BTK[..., :, None] * inverse_BTK[..., None, :], chosen_BTK)


def chosen_probability(probabilities_BTE, experts_BTK):
    """(B, T): the share of a token's probability that its experts hold; a slot whose expert is E or above is empty."""
    probability_BTK = jnp.take_along_axis(probabilities_BTE, experts_BTK, axis=-1, mode="fill", fill_value=0)
    return jnp.sum(probability_BTK, axis=-1, dtype=jnp.float32)


def path_coupling(chosen_LBT, mask_BT):
    """L_cp of `chosen_probability` of every layer: mean over adjacent layers and unmasked tokens; 0 for one layer."""
    pairs = max(len(chosen_LBT) - 1, 1)
    return -jnp.sum(chosen_LBT[:-1] * chosen_LBT[1:] * mask_BT) / (pairs * jnp.maximum(jnp.sum(mask_BT), 1))
