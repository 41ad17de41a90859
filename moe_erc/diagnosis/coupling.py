"""The measures of router rows and gates of a model in training, wherever its parameters lie.

`layers.py` asks more, of any model, on the host. All matmuls are in full float32, on every
platform.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_erc.diagnosis.alignment import alignment
from moe_erc.losses.erc import coupling_matrix
from moe_erc.measures.coupling import ALIGNMENT
from moe_erc.measures.registry import reading


def measure_coupling(
    router_LED: jax.Array, w_gate_LEDF: jax.Array, mesh: jax.sharding.Mesh | None = None
) -> dict[str, jax.Array]:
    """The measures of coupling matrices and weights, by key, (L,) each.

    One layer is in memory at a time. With the mesh on which the gates lie, each device has its own
    part of it, and all get the results.
    """
    # The program depends on what is in the table: measures are its arguments, and not read inside.
    return _measure(router_LED, w_gate_LEDF, mesh, reading("matrix"), reading("weights"))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _measure(router_LED, w_gate_LEDF, mesh, of_matrix, of_weights):
    def of_layer(matrix_router_and_norms):
        M_EE, router_ED, gate_norm_E = matrix_router_and_norms
        matrix = {measure.key: measure.compute(M_EE) for measure in of_matrix}
        weights = {measure.key: measure.compute(router_ED, gate_norm_E) for measure in of_weights}
        return matrix | weights

    M_LEE = coupling_matrix(router_LED, w_gate_LEDF, mesh)
    if mesh is not None:
        everywhere = NamedSharding(mesh, P())
        M_LEE = lax.with_sharding_constraint(M_LEE, everywhere)
    found = lax.map(of_layer, (M_LEE, router_LED, gate_norms(w_gate_LEDF)))
    found[ALIGNMENT.key] = jnp.mean(alignment(router_LED, w_gate_LEDF, mesh), axis=1)
    return found if mesh is None else lax.with_sharding_constraint(found, everywhere)


def gate_norms(w_gate_EDF: jax.Array) -> jax.Array:
    """Frobenius norms in float32, (E,); leading axes stay."""
    return jnp.sqrt(jnp.sum(jnp.square(w_gate_EDF.astype(jnp.float32)), axis=(-2, -1)))
