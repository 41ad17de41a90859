"""SimBal, similarity-preserving routers (arXiv 2506.14038).

    loss = sum of the absolute entries of R R^T - I

It is 0 when the rows are orthonormal. An orthonormal router sends like tokens to like experts, so
this loss takes the place of a balance loss. Rows are not normalised, so the loss holds their
lengths at 1. It is not divided by E^2.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.losses.base import Loss, Needs, NoOptions


def simbal(router_LED: jax.Array) -> jax.Array:
    """Mean over layers of the summed absolute entries of R R^T - I.

    An entry that is exactly 0 has gradient 0.
    """
    router_LED = jnp.asarray(router_LED, jnp.float32)
    gram_LEE = jnp.einsum("lid,ljd->lij", router_LED, router_LED, precision=lax.Precision.HIGHEST)
    excess_LEE = gram_LEE - jnp.eye(router_LED.shape[-2])
    # The slope of jnp.abs at 0 is 1, and would move an entry away from 0.
    size_LEE = excess_LEE * lax.stop_gradient(jnp.sign(excess_LEE))
    return jnp.mean(jnp.sum(size_LEE, axis=(-2, -1)))


def compute(
    options: NoOptions,
    params: Any,
    rng: jax.Array | None,
    model: Any,
    shape_BT: tuple[int, int] | None,
) -> jax.Array:
    """The loss of the router's rows in all layers."""
    return simbal(params["layers"]["moe"]["router"])


LOSS = Loss(
    kind="parameters",
    compute=compute,
    needs=Needs("is_linear", "reads one router row of the model's width for every expert"),
)
