"""Router orthogonality (ERNIE 4.5; the baseline of Figure 6c of ERC, arXiv 2512.23447): rows at right angles.

    loss = |R^ R^T - I|_F^2 / E^2,   R^ the router's rows at length 1      0 when orthonormal, below 1 whatever the rows

It sees directions alone: the length of a row changes nothing, and its gradient is at right angles to the row.
"""

import jax.numpy as jnp
from jax import lax

from moe_erc.losses.erc import root


def router_orthogonality(router_LED):
    """Mean over layers of the squared distance of the rows' cosines from the identity, over E^2.

    An all-zero row has no direction: its cosines are 0, so that it costs 1 / E^2 on the diagonal and has gradient 0.
    """
    router_LED = jnp.asarray(router_LED, jnp.float32)
    experts = router_LED.shape[-2]
    length_LE1 = root(jnp.sum(router_LED**2, axis=-1, keepdims=True))
    row_LED = router_LED / jnp.where(length_LE1 > 0, length_LE1, 1)
    cosine_LEE = jnp.einsum("lid,ljd->lij", row_LED, row_LED, precision=lax.Precision.HIGHEST)
    return jnp.mean(jnp.sum((cosine_LEE - jnp.eye(experts)) ** 2, axis=(-2, -1))) / experts**2
