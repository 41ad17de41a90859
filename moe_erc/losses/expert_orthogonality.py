"""Experts that differ and routing that decides (arXiv 2505.22323): two losses, of the experts and of the router.

    L_o = mean over tokens and ordered pairs of chosen experts of | <o_j, o_k> / (<o_k, o_k> + eps) o_k |^2
    L_v = - 1 / (N E) sum_{n, e} (s_ne - mean_n s_ne)^2,   s the top K scores, sum 1, and 0 for the other experts

L_o is the square of what o_j shares with o_k, by outputs before their weights: the router has no part in it.
It trains every matrix that an expert's output reads: of a factorised gate w_low too, which under AoE is the router.
L_v trains the router's own parameters: under MPI not the gates that its rows are turned by, under AoE w_low.

Of several micro-batches each has its own mean of pairs and its own mean score, and counts by its share of unmasked
tokens. Where every token has K experts, L_o is then that of the whole batch; a variance is not additive.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.losses.pairs import gram, mean_over_pairs, squared_lengths


def output_overlap(output_BTKD, chosen_BTK, eps=1e-8):
    """L_o of one layer; 0 where no token chose two experts. The paper's sums are a mean here.

    Args:
      output_BTKD: what each chosen expert gave the token, not weighted; finite in every slot.
      chosen_BTK: bool: the token counts and the slot holds an expert.
      eps: keeps the projection onto an all-zero output at 0.
    """
    gram_BTKK = gram(output_BTKD)
    length2_BT1K = squared_lengths(gram_BTKK)[..., None, :]
    share_BTKK = gram_BTKK / (length2_BT1K + eps)  # of o_k in o_j
    return mean_over_pairs(share_BTKK**2 * length2_BT1K, chosen_BTK)


def routing_variance(probabilities_BTE, experts_BTK, mask_BT):
    """L_v of one layer, a mean over the unmasked tokens; 0 when all of them are routed alike. Lower is more decided.

    A slot whose expert is E or above is empty. The gradient reaches the probabilities of the chosen alone.
    """
    experts = probabilities_BTE.shape[-1]
    chosen_BTE = jnp.any(jax.nn.one_hot(experts_BTK, experts, dtype=bool), axis=-2)
    kept_BTE = jnp.where(chosen_BTE, probabilities_BTE, 0).astype(jnp.float32)
    total_BT1 = jnp.sum(kept_BTE, axis=-1, keepdims=True)
    score_BTE = kept_BTE / jnp.where(total_BT1 > 0, total_BT1, 1)
    share_BT = mask_BT / jnp.maximum(jnp.sum(mask_BT), 1)
    # Two passes: the mean square less the squared mean would leave nothing of a small variance.
    mean_E = jnp.einsum("bte,bt->e", score_BTE, share_BT, precision=lax.Precision.HIGHEST)
    return -jnp.sum(jnp.mean((score_BTE - mean_E) ** 2, axis=-1) * share_BT)
