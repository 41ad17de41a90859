"""Specialization (arXiv 2602.14159, L_sp): experts that differ on a token.

    L_sp = mean over tokens and ordered pairs of chosen experts of cos(h_j, h_k),
    h the hidden activation after the SwiGLU product

The paper's second loss is `path_coupling.py`.
"""

from typing import Any

import jax

from moe_erc.losses.base import Loss, NoOptions
from moe_erc.losses.pairs import gram, mean_over_pairs, squared_lengths
from moe_erc.numerics import divide, square_root


def specialization(hidden_BTKF: jax.Array, chosen_BTK: jax.Array) -> jax.Array:
    """L_sp of one layer; 0 where no token chose two experts.

    `chosen_BTK` is a bool, `hidden_BTKF` is finite everywhere. The cosine with an all-zero vector
    is 0, and so is its gradient.
    """
    gram_BTKK = gram(hidden_BTKF)
    inverse_BTK = divide(1, square_root(squared_lengths(gram_BTKK)))
    cosine_BTKK = gram_BTKK * inverse_BTK[..., :, None] * inverse_BTK[..., None, :]
    return mean_over_pairs(cosine_BTKK, chosen_BTK)


def compute(options: NoOptions, layer: Any) -> jax.Array:
    """L_sp of a layer's chosen experts."""
    return specialization(layer.kept["hidden"], layer.chosen_BTK)


LOSS = Loss(kind="layer", compute=compute, keep=("hidden",))
