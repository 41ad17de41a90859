"""Router orthogonality (ERNIE 4.5; the baseline of Figure 6c of ERC, arXiv 2512.23447).

    loss = |R^ R^T - I|_F^2 / E^2,   R^ the router's rows at length 1

It is 0 when the rows are orthonormal, and below 1 whatever they are. The loss sees directions
alone: the length of a row changes nothing, and the gradient is at right angles to the row.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.losses.base import Loss, Needs
from moe_erc.numerics import nonzero, square_root


@dataclasses.dataclass(frozen=True)
class RouterOrthogonalityOptions:
    """The options of router orthogonality.

    decoupled: True means router -= weight * gradient, after the optimizer's update.
    """

    decoupled: bool


def router_orthogonality(router_LED: jax.Array) -> jax.Array:
    """Mean over layers of the squared distance of the rows' cosines from the identity, over E^2.

    An all-zero row has no direction: its cosines are 0, so that it adds 1 / E^2 on the diagonal,
    and its gradient is 0.
    """
    router_LED = jnp.asarray(router_LED, jnp.float32)
    experts = router_LED.shape[-2]
    length_LE1 = square_root(jnp.sum(router_LED**2, axis=-1, keepdims=True))
    row_LED = router_LED / nonzero(length_LE1)
    cosine_LEE = jnp.einsum("lid,ljd->lij", row_LED, row_LED, precision=lax.Precision.HIGHEST)
    distance_L = jnp.sum((cosine_LEE - jnp.eye(experts)) ** 2, axis=(-2, -1))
    return jnp.mean(distance_L) / experts**2


def compute(
    options: RouterOrthogonalityOptions,
    params: Any,
    rng: jax.Array | None,
    model: Any,
    shape_BT: tuple[int, int] | None,
) -> jax.Array:
    """The loss of the router's rows in all layers."""
    return router_orthogonality(params["layers"]["moe"]["router"])


LOSS = Loss(
    kind="parameters",
    compute=compute,
    options=RouterOrthogonalityOptions,
    needs=Needs("is_linear", "reads one router row of the model's width for every expert"),
)
