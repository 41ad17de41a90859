"""Is the router of a trained MoE coupled to its experts? Read off the parameters alone, with the clean router.

ERC(alpha)       the loss of `losses/erc.py` by layer; a vanilla MoE falls to 0 only at alpha 3 to 5 (paper, Table 2)
vanishing alpha  max_{i != j} max(M[i, j] / M[i, i], M[i, j] / M[j, j]), the smallest alpha at which ERC is 0
diagonal share   rows and columns of M whose largest entry is the diagonal's
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_erc.losses.erc import coupling_matrix, coupling_penalty, noise_bound
from moe_erc.losses.sharded_erc import sharded_coupling_matrix

ALPHAS = (1.0, 2.0, 3.0, 4.0, 5.0)


@partial(jax.jit, static_argnames="mesh")
def measure_coupling(router_LED, w_gate_LEDF, mesh=None):
    """Measures by layer, leaves with a leading axis L; `erc_LA` has a column per `ALPHAS`.

    One expert in memory at a time, or with the mesh on which the gates lie each device's own; all get the results.
    """
    if mesh is None:
        M_LEE = lax.map(lambda layer: coupling_matrix(*layer), (router_LED, w_gate_LEDF))
    else:
        everywhere = NamedSharding(mesh, P())
        M_LEE = lax.with_sharding_constraint(sharded_coupling_matrix(router_LED, w_gate_LEDF, mesh), everywhere)
    gate_norm_LE = jnp.sqrt(jnp.sum(jnp.square(w_gate_LEDF.astype(jnp.float32)), axis=(-2, -1)))
    measures = lax.map(_measure_layer, (M_LEE, router_LED, gate_norm_LE))
    return measures if mesh is None else lax.with_sharding_constraint(measures, everywhere)


def _measure_layer(matrix_router_and_norms):
    M_EE, router_ED, gate_norm_E = matrix_router_and_norms
    diagonal_E = jnp.diagonal(M_EE)
    foreign_EE = jnp.where(jnp.eye(len(M_EE), dtype=bool), 0, M_EE)
    lowest_EE = jnp.minimum(diagonal_E[:, None], diagonal_E[None, :])
    router_norm_E = jnp.linalg.norm(router_ED.astype(jnp.float32), axis=-1)
    return {
        "erc_LA": jnp.stack([coupling_penalty(M_EE, alpha) for alpha in ALPHAS]),
        "vanishing_alpha_L": jnp.max(jnp.where(foreign_EE > 0, foreign_EE / lowest_EE, 0)),
        "diagonal_rows_L": jnp.mean(diagonal_E >= jnp.max(foreign_EE, axis=1)),
        "diagonal_columns_L": jnp.mean(diagonal_E >= jnp.max(foreign_EE, axis=0)),
        "noise_bound_L": jnp.mean(noise_bound(router_ED)),
        "router_norm_L": jnp.mean(router_norm_E),
        "router_spread_L": jnp.std(router_norm_E),
        "gate_norm_L": jnp.mean(gate_norm_E),
        "gate_spread_L": jnp.std(gate_norm_E),
    }


def summarize_coupling(measures):
    """One number each, for curves: the layers' means under metric names."""
    return {
        "coupling/erc": jnp.mean(measures["erc_LA"][:, 0]),
        "coupling/diagonal_rows": jnp.mean(measures["diagonal_rows_L"]),
        "coupling/diagonal_columns": jnp.mean(measures["diagonal_columns_L"]),
        "coupling/noise_bound": jnp.mean(measures["noise_bound_L"]),
    }
