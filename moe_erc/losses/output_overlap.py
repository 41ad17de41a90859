"""Overlap of expert outputs (arXiv 2505.22323, L_o): experts that answer one token differently.

    L_o = mean over tokens and ordered pairs of chosen experts of
          | <o_j, o_k> / (<o_k, o_k> + eps) o_k |^2

This is the square of what o_j shares with o_k. o are the outputs before their weights, so the loss
does not depend on the weights. It trains every matrix that an expert's output reads. With a
factorised gate w_low is one of them, which under AoE is the router. The paper's second loss is
`routing_variance.py`.

Each of several micro-batches has its own mean of pairs, and is weighed by its share of unmasked
tokens. Where every token has K experts, the result is L_o of the whole batch.

The code that the authors released computes something else, which is offered as reading "released":

    groups  = the outputs of all slots in the order of their experts, cut into groups of K
    loss    = mean over groups and k of |projection of o_k on the span of the other K - 1|^2

The outputs of one expert stand together in that order. So nearly all groups hold K tokens of one
expert, and not K experts of one token: the loss pushes apart what one expert gives different
tokens. The projection is not divided by the length of anything. Sorting moves outputs over devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.losses.base import Loss
from moe_erc.losses.pairs import gram, mean_over_pairs, squared_lengths
from moe_erc.losses.readings import ReadingOptions
from moe_erc.numerics import divide, masked_mean, square_root


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


def released_overlap(
    output_BTKD: jax.Array, experts_BTK: jax.Array, chosen_BTK: jax.Array
) -> jax.Array:
    """The reading "released" of one layer; 0 for K = 1.

    Groups are cut from the slots that hold an expert of an unmasked token. A last group that is not
    full does not count.

    Args:
      output_BTKD: what each chosen expert gave the token, not weighted; finite in every slot.
      experts_BTK: the expert of every slot.
      chosen_BTK: bool: the token counts and the slot holds an expert.
    """
    size = output_BTKD.shape[-2]
    chosen_S = chosen_BTK.reshape(-1)
    expert_S = jnp.where(chosen_S, experts_BTK.reshape(-1), jnp.iinfo(jnp.int32).max)
    # A stable sort keeps the tokens of one expert in their order, as a loop over experts does.
    order_S = jnp.argsort(expert_S, stable=True)
    flat_SD = output_BTKD.reshape(-1, output_BTKD.shape[-1])
    grouped_NKD = flat_SD[order_S].reshape(-1, size, flat_SD.shape[-1]).astype(jnp.float32)
    full_N = jnp.all(chosen_S[order_S].reshape(-1, size), axis=-1)

    def of_slot(slot):
        turned_NKD = jnp.roll(grouped_NKD, -slot, axis=1)
        return masked_mean(_squared_projection(turned_NKD[:, 0], turned_NKD[:, 1:]), full_N)

    return jnp.mean(lax.map(of_slot, jnp.arange(size)))


def _squared_projection(vector_ND, others_NJD):
    """The squared length of the projection of a vector on the span of others, (N,)."""
    basis = []
    total_N = jnp.zeros(len(vector_ND))
    for j in range(others_NJD.shape[1]):
        direction_ND = others_NJD[:, j]
        # One by one from what is left, which loses fewer digits than all at once.
        for earlier_ND in basis:
            direction_ND -= _dot(earlier_ND, direction_ND)[:, None] * earlier_ND
        direction_ND = divide(direction_ND, square_root(_dot(direction_ND, direction_ND))[:, None])
        basis.append(direction_ND)
        total_N += _dot(direction_ND, vector_ND) ** 2
    return total_N


def _dot(a_ND, b_ND):
    return jnp.sum(a_ND * b_ND, axis=-1)


def compute(options: ReadingOptions, layer: Any) -> jax.Array:
    """The loss of what a layer's chosen experts gave."""
    output_BTKD = layer.kept["output"]
    if options.reading == "released":
        return released_overlap(output_BTKD, layer.routing.experts_BTK, layer.chosen_BTK)
    return output_overlap(output_BTKD, layer.chosen_BTK)


LOSS = Loss(kind="layer", compute=compute, options=ReadingOptions, keep=("output",))
