"""Norms of router rows and gates, mean and spread over experts, and the cosine of rows.

Row cosine is the mean over ordered pairs of router rows.
"""

import jax
import jax.numpy as jnp

from moe_erc.measures.base import Measure
from moe_erc.numerics import divide


def unit_rows(rows_ED: jax.Array) -> jax.Array:
    """Rows of length 1 in float32; a zero row stays zero."""
    rows_ED = rows_ED.astype(jnp.float32)
    return divide(rows_ED, jnp.linalg.norm(rows_ED, axis=-1, keepdims=True))


def _row_cosine(router_ED, gate_norm_E):
    """|sum of unit rows|^2 counts every pair, and every row with itself."""
    unit_ED = unit_rows(router_ED)
    pairs = jnp.sum(jnp.square(jnp.sum(unit_ED, axis=0))) - jnp.sum(jnp.square(unit_ED))
    return pairs / max(len(unit_ED) * (len(unit_ED) - 1), 1)


def _router_norms(router_ED):
    return jnp.linalg.norm(router_ED.astype(jnp.float32), axis=-1)


def _router_norm(router_ED, gate_norm_E):
    return jnp.mean(_router_norms(router_ED))


def _router_spread(router_ED, gate_norm_E):
    return jnp.std(_router_norms(router_ED))


def _gate_norm(router_ED, gate_norm_E):
    return jnp.mean(gate_norm_E)


def _gate_spread(router_ED, gate_norm_E):
    return jnp.std(gate_norm_E)


ROW_COSINE = Measure("weights/row_cosine", "row cosine", "", True, _row_cosine, reads="weights")
ROUTER_NORM = Measure(
    "weights/router_norm", "router norm", "mean", True, _router_norm, reads="weights"
)
ROUTER_SPREAD = Measure(
    "weights/router_spread", "router spread", "deviation", True, _router_spread, reads="weights"
)
GATE_NORM = Measure("weights/gate_norm", "gate norm", "mean", True, _gate_norm, reads="weights")
GATE_SPREAD = Measure(
    "weights/gate_spread", "gate spread", "deviation", True, _gate_spread, reads="weights"
)

MEASURES = (ROW_COSINE, ROUTER_NORM, ROUTER_SPREAD, GATE_NORM, GATE_SPREAD)
