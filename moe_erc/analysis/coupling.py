"""Is the router of a trained MoE coupled to its experts? Read off the parameters alone, with the clean router.

What a run measures as it trains, wherever its parameters lie; `survey.py` asks more, of any model, on the host.

ERC(alpha)       the loss of `losses/erc.py` by layer; a vanilla MoE falls to 0 only at alpha 3 to 5 (paper, Table 2)
vanishing alpha  max_{i != j} max(M[i, j] / M[i, i], M[i, j] / M[j, j]), the smallest alpha at which ERC is 0
diagonal share   rows and columns of M whose largest entry is the diagonal's
alignment        |r W| / (|r| sigma_max(W)) of a row r and its expert's gate W, mean over experts (`alignment.py`)
row cosine       mean over pairs of router rows

A diagonal entry that ties with another as the largest of its row or column counts as held. All matmuls are in full
float32, on every platform.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_erc.analysis.alignment import alignment, unit_rows
from moe_erc.losses.erc import coupling_matrix, coupling_penalty, noise_bound

ALPHAS = (1.0, 2.0, 3.0, 4.0, 5.0)


@partial(jax.jit, static_argnames="mesh")
def measure_coupling(router_LED, w_gate_LEDF, mesh=None):
    """Measures by layer, leaves with a leading axis L; `erc_LA` has a column per `ALPHAS`.

    One layer in memory at a time, or with the mesh on which the gates lie each device's own of it; all get the results.
    """
    M_LEE = coupling_matrix(router_LED, w_gate_LEDF, mesh)
    if mesh is not None:
        everywhere = NamedSharding(mesh, P())
        M_LEE = lax.with_sharding_constraint(M_LEE, everywhere)
    measures = lax.map(_measure_layer, (M_LEE, router_LED, gate_norms(w_gate_LEDF)))
    measures["alignment_L"] = jnp.mean(alignment(router_LED, w_gate_LEDF, mesh), axis=1)
    return measures if mesh is None else lax.with_sharding_constraint(measures, everywhere)


def _measure_layer(matrix_router_and_norms):
    M_EE, router_ED, gate_norm_E = matrix_router_and_norms
    return measure_matrix(M_EE) | measure_weights(router_ED, gate_norm_E)


def measure_matrix(M_EE):
    """What a coupling matrix says by itself; of one layer."""
    diagonal_E = jnp.diagonal(M_EE)
    foreign_EE = jnp.where(jnp.eye(len(M_EE), dtype=bool), 0, M_EE)
    lowest_EE = jnp.minimum(diagonal_E[:, None], diagonal_E[None, :])
    return {
        "erc_LA": erc_by_alpha(M_EE),
        "vanishing_alpha_L": jnp.max(jnp.where(foreign_EE > 0, foreign_EE / lowest_EE, 0)),
        "diagonal_rows_L": jnp.mean(diagonal_E >= jnp.max(foreign_EE, axis=1)),
        "diagonal_columns_L": jnp.mean(diagonal_E >= jnp.max(foreign_EE, axis=0)),
    }


def erc_by_alpha(M_EE):
    """(A,), an entry per `ALPHAS`."""
    return jnp.stack([coupling_penalty(M_EE, alpha) for alpha in ALPHAS])


def measure_weights(router_ED, gate_norm_E):
    """Norms of rows and gates, mean and spread, and how the rows lie to one another; of one layer."""
    router_norm_E = jnp.linalg.norm(router_ED.astype(jnp.float32), axis=-1)
    return {
        "noise_bound_L": jnp.mean(noise_bound(router_ED)),
        "row_cosine_L": _mean_cosine(router_ED),
        "router_norm_L": jnp.mean(router_norm_E),
        "router_spread_L": jnp.std(router_norm_E),
        "gate_norm_L": jnp.mean(gate_norm_E),
        "gate_spread_L": jnp.std(gate_norm_E),
    }


def gate_norms(w_gate_EDF):
    """Frobenius norms in float32; leading axes stay."""
    return jnp.sqrt(jnp.sum(jnp.square(w_gate_EDF.astype(jnp.float32)), axis=(-2, -1)))


def _mean_cosine(rows_ED):
    """Over ordered pairs of rows: |sum of unit rows|^2 counts every pair, and every row with itself."""
    unit_ED = unit_rows(rows_ED)
    pairs = jnp.sum(jnp.square(jnp.sum(unit_ED, axis=0))) - jnp.sum(jnp.square(unit_ED))
    return pairs / max(len(rows_ED) * (len(rows_ED) - 1), 1)


def summarize_coupling(measures):
    """What curves show: vectors by layer under metric names; ERC is that of alpha 1."""
    names = ("diagonal_rows", "diagonal_columns", "noise_bound", "alignment", "row_cosine")
    return {"coupling/erc": measures["erc_LA"][:, 0]} | {f"coupling/{name}": measures[f"{name}_L"] for name in names}
