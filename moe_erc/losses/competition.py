"""CompeteSMoE v2 (arXiv 2505.13380): the router learns to foretell which experts would answer most strongly.

    loss = mse(p, sg(q)) + 0.2 mse(p[top], sg(q[top])),   p the router's softmax, q that of the experts' answers

`top` are the K experts of highest q, which carry the token on such a step; q is constant, the experts are not trained.
Over layers it is a mean of those that compete on the step: a layer that does not has no error, rather than one of 0.
"""

import jax
import jax.numpy as jnp
from jax import lax

CHOSEN = 0.2  # what the chosen experts' error counts besides


def over_competing_layers(error_and_active_L2: jax.Array) -> jax.Array:
    """Mean error of the layers whose second number is 1; 0 if none competes."""
    error_L, active_L = error_and_active_L2[:, 0], error_and_active_L2[:, 1]
    return jnp.sum(error_L * active_L) / jnp.maximum(jnp.sum(active_L), 1)


def competition(probabilities_BTE, competitors_BTE, experts_BTK, mask_BT):
    """Mean over unmasked tokens of the error over E, and of that over the K slots; an empty slot (id >= E) adds 0."""
    square_BTE = jnp.square(probabilities_BTE.astype(jnp.float32) - lax.stop_gradient(competitors_BTE))
    square_BTK = jnp.take_along_axis(square_BTE, experts_BTK, axis=-1, mode="fill", fill_value=0)
    error_BT = jnp.mean(square_BTE, axis=-1) + CHOSEN * jnp.mean(square_BTK, axis=-1)
    return jnp.sum(error_BT * mask_BT) / jnp.maximum(jnp.sum(mask_BT), 1)
