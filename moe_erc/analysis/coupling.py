"""Is the router of a trained MoE coupled to its experts? Read off the parameters alone, with the clean router.

ERC(alpha)       the loss of `losses/erc.py` by layer; a vanilla MoE falls to 0 only at alpha 3 to 5 (paper, Table 2)
vanishing alpha  max_{i != j} max(M[i, j] / M[i, i], M[i, j] / M[j, j]), the smallest alpha at which ERC is 0
diagonal share   rows and columns of M whose largest entry is the diagonal's
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.losses.erc import coupling_matrix, coupling_penalty, noise_bound

ALPHAS = (1.0, 2.0, 3.0, 4.0, 5.0)


@jax.jit
def measure_coupling(router_LED, w_gate_LEDF):
    """Measures by layer, leaves with a leading axis L, one layer in memory; `erc_LA` has a column per `ALPHAS`."""

    def layer(router_and_gate):
        router_ED, w_gate_EDF = router_and_gate
        M_EE = coupling_matrix(router_ED, w_gate_EDF)
        diagonal_E = jnp.diagonal(M_EE)
        foreign_EE = jnp.where(jnp.eye(len(M_EE), dtype=bool), 0, M_EE)
        lowest_EE = jnp.minimum(diagonal_E[:, None], diagonal_E[None, :])
        router_norm_E = jnp.linalg.norm(router_ED.astype(jnp.float32), axis=-1)
        gate_norm_E = lax.map(lambda w_DF: jnp.linalg.norm(w_DF.astype(jnp.float32)), w_gate_EDF)
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

    return lax.map(layer, (router_LED, w_gate_LEDF))


def summarize_coupling(measures):
    """One number each, for curves: the layers' means under metric names."""
    return {
        "coupling/erc": jnp.mean(measures["erc_LA"][:, 0]),
        "coupling/diagonal_rows": jnp.mean(measures["diagonal_rows_L"]),
        "coupling/diagonal_columns": jnp.mean(measures["diagonal_columns_L"]),
        "coupling/noise_bound": jnp.mean(measures["noise_bound_L"]),
    }
