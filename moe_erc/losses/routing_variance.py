"""Variance of routing weights (arXiv 2505.22323, L_v): a router that decides.

    L_v = - 1 / (N E) sum_{n, e} (s_ne - mean_n s_ne)^2,
    s the top K scores of a token, with sum 1, and 0 for the other experts

The loss trains only the router's own parameters. Under MPI these exclude the gates that turn its
rows; under AoE they are w_low. The paper's first loss is `output_overlap.py`.

Each of several micro-batches has its own mean score, and is weighed by its share of unmasked
tokens. A variance is not additive, so the result is not that of the whole batch.

The code that the authors released computes something else, which is offered as reading "released":

    loss = - mean_n 1 / (E - 1) sum_e (p_ne - 1 / E)^2,   p all probabilities, before the top K

It is the variance over the experts of one token, where the paper's is over the tokens of one
expert. Its gradient reaches all that the probabilities read.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.losses.base import Loss, Needs
from moe_erc.losses.readings import ReadingOptions
from moe_erc.numerics import divide, masked_mean, nonzero


def routing_variance(
    probabilities_BTE: jax.Array, experts_BTK: jax.Array, mask_BT: jax.Array
) -> jax.Array:
    """L_v of one layer, a mean over the unmasked tokens; 0 when all of them are routed alike.

    The lower it is, the more decided the router. A slot whose expert is E or above is empty. The
    gradient reaches the probabilities of the chosen alone.
    """
    experts = probabilities_BTE.shape[-1]
    chosen_BTE = jnp.any(jax.nn.one_hot(experts_BTK, experts, dtype=bool), axis=-2)
    kept_BTE = jnp.where(chosen_BTE, probabilities_BTE, 0).astype(jnp.float32)
    score_BTE = kept_BTE / nonzero(jnp.sum(kept_BTE, axis=-1, keepdims=True))
    share_BT = divide(mask_BT, jnp.sum(mask_BT))
    # Two passes: the mean square less the squared mean would leave nothing of a small variance.
    mean_E = jnp.einsum("bte,bt->e", score_BTE, share_BT, precision=lax.Precision.HIGHEST)
    return -jnp.sum(jnp.mean((score_BTE - mean_E) ** 2, axis=-1) * share_BT)


def released_variance(probabilities_BTE: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """The reading "released" of one layer, a mean over the unmasked tokens."""
    return -masked_mean(jnp.var(probabilities_BTE, axis=-1, ddof=1), mask_BT)


def compute(options: ReadingOptions, layer: Any) -> jax.Array:
    """The loss of a layer's routing."""
    if options.reading == "released":
        return released_variance(layer.scores.probabilities_BTE, layer.mask_BT)
    probabilities_BTE = layer.score_alone().probabilities_BTE
    return routing_variance(probabilities_BTE, layer.routing.experts_BTK, layer.mask_BT)


LOSS = Loss(
    kind="layer",
    compute=compute,
    options=ReadingOptions,
    needs=Needs("has_probabilities", "reads probabilities"),
)
