"""SimBal, similarity-preserving routers (arXiv 2506.14038): an orthonormal router in place of a balance loss.

    loss = | R R^T - I |_1, entrywise      0 when the rows are orthonormal, which sends like tokens to like experts

Rows keep their lengths, so the loss holds them at 1; it is not divided by E^2.
"""

import jax.numpy as jnp
from jax import lax


def simbal(router_LED):
    """Mean over layers of the summed absolute entries of R R^T - I; an entry that is exactly 0 has gradient 0."""
    router_LED = jnp.asarray(router_LED, jnp.float32)
    gram_LEE = jnp.einsum("lid,ljd->lij", router_LED, router_LED, precision=lax.Precision.HIGHEST)
    excess_LEE = gram_LEE - jnp.eye(router_LED.shape[-2])
    size_LEE = excess_LEE * lax.stop_gradient(jnp.sign(excess_LEE))  # jnp.abs has slope 1 at 0, and would leave it
    return jnp.mean(jnp.sum(size_LEE, axis=(-2, -1)))
