"""Overlap of expert outputs (arXiv 2505.22323, L_o): experts that answer one token differently.

    L_o = mean over tokens and ordered pairs of chosen experts of
          | <o_j, o_k> / (<o_k, o_k> + eps) o_k |^2

This is the square of what o_j shares with o_k. o are the outputs before their weights, so the loss
does not depend on the weights. It trains every matrix that an expert's output reads. With a
factorised gate w_low is one of them, which under AoE is the router. The paper's second loss is
`routing_variance.py`.

Each of several micro-batches has its own mean of pairs, and is weighed by its share of unmasked
tokens. Where every token has K experts, the result is L_o of the whole batch.
"""

from typing import Any

import jax

from moe_erc.losses.base import Loss, NoOptions
from moe_erc.losses.pairs import gram, mean_over_pairs, squared_lengths


def output_overlap(output_BTKD: jax.Array, chosen_BTK: jax.Array, eps: float = 1e-8) -> jax.Array:
    """L_o of one layer; 0 where no token chose two experts. The paper's sums are a mean here.

    Args:
      output_BTKD: what each chosen expert gave the token, not weighted; finite in every slot.
      chosen_BTK: bool: the token counts and the slot holds an expert.
      eps: keeps the projection onto an all-zero output at 0.
    """
    gram_BTKK = gram(output_BTKD)
    length2_BT1K = squared_lengths(gram_BTKK)[..., None, :]
    # The share of o_k in o_j.
    share_BTKK = gram_BTKK / (length2_BT1K + eps)
    return mean_over_pairs(share_BTKK**2 * length2_BT1K, chosen_BTK)


def compute(options: NoOptions, layer: Any) -> jax.Array:
    """L_o of what a layer's chosen experts gave."""
    return output_overlap(layer.kept["output"], layer.chosen_BTK)


LOSS = Loss(kind="layer", compute=compute, keep=("output",))
