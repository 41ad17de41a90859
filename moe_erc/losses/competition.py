"""CompeteSMoE v2 (arXiv 2505.13380): the router learns to predict which experts answer most.

    loss = mse(p, sg(q)) + 0.2 mse(p[top], sg(q[top])),
    p the router's softmax, q the softmax of the experts' answers

`top` are the K experts of highest q, to which the token is sent on such a step. q is constant, so
the loss does not train the experts. It is a mean over the layers that compete on the step; the
other layers are left out of the mean.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.losses.base import Loss, Needs, NoOptions
from moe_erc.numerics import masked_mean

CHOSEN = 0.2  # the weight of the chosen experts' error, beside that of all experts


def competition(
    probabilities_BTE: jax.Array,
    competitors_BTE: jax.Array,
    experts_BTK: jax.Array,
    mask_BT: jax.Array,
) -> jax.Array:
    """Mean over unmasked tokens of the error over E plus 0.2 times the error over the K slots.

    An empty slot (id >= E) adds 0.
    """
    difference_BTE = probabilities_BTE.astype(jnp.float32) - lax.stop_gradient(competitors_BTE)
    square_BTE = jnp.square(difference_BTE)
    square_BTK = jnp.take_along_axis(square_BTE, experts_BTK, axis=-1, mode="fill", fill_value=0)
    error_BT = jnp.mean(square_BTE, axis=-1) + CHOSEN * jnp.mean(square_BTK, axis=-1)
    return masked_mean(error_BT, mask_BT)


def over_competing_layers(error_and_active_L2: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean error of the layers whose second number is 1; 0 if none competes."""
    error_L = error_and_active_L2[:, 0]
    active_L = error_and_active_L2[:, 1]
    return masked_mean(error_L, active_L == 1)


def compute(options: NoOptions, layer: Any) -> jax.Array:
    """(error, whether the layer competes) as two numbers; the error is 0 where it does not."""
    active, competitors_BTE = layer.auxiliary
    error = competition(
        layer.scores.probabilities_BTE, competitors_BTE, layer.routing.experts_BTK, layer.mask_BT
    )
    return jnp.stack([jnp.where(active, error, 0), active])


LOSS = Loss(
    kind="layer",
    compute=compute,
    needs=Needs("competes", "learns from experts that compete"),
    over_layers=over_competing_layers,
)
