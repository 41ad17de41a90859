"""Path coupling (arXiv 2602.14159, L_cp): paths of experts from layer to layer.

    L_cp = - mean_N sum over chosen e of layer l, chosen v of layer l + 1 of p[l, e] p[l + 1, v]

The double sum is a product of two sums: each layer contributes one number per token. The loss is a
mean over the L - 1 pairs of adjacent layers. The paper's first loss is `specialization.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_erc.losses.base import Loss, Needs, NoOptions
from moe_erc.numerics import divide


def chosen_probability(probabilities_BTE: jax.Array, experts_BTK: jax.Array) -> jax.Array:
    """(B, T): the share of a token's probability that its experts hold.

    A slot whose expert is E or above is empty.
    """
    probability_BTK = jnp.take_along_axis(
        probabilities_BTE, experts_BTK, axis=-1, mode="fill", fill_value=0
    )
    return jnp.sum(probability_BTK, axis=-1, dtype=jnp.float32)


def path_coupling(chosen_LBT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """L_cp of `chosen_probability` of every layer; 0 for one layer.

    The mean is over adjacent layers and unmasked tokens.
    """
    pairs = max(len(chosen_LBT) - 1, 1)
    return divide(-jnp.sum(chosen_LBT[:-1] * chosen_LBT[1:] * mask_BT), pairs * jnp.sum(mask_BT))


def compute(options: NoOptions, layer: Any) -> jax.Array:
    """What one layer contributes to the product."""
    return chosen_probability(layer.scores.probabilities_BTE, layer.routing.experts_BTK)


LOSS = Loss(
    kind="layer",
    compute=compute,
    needs=Needs("has_probabilities", "reads probabilities"),
    over_layers=path_coupling,
)
