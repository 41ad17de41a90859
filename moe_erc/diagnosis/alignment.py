"""How much of the strongest direction of its expert's gate does a router row hold? (arXiv 2606.12397)

    alignment = |r @ W| / (|r| sigma_max(W))     in [0, 1]; 1 if r is the gate's first left singular vector

sigma_max without an SVD, which is slow on TPUs: for the Gram matrix G of W, P = G^(2^s) is all but rank 1, and
sigma_max^2 = tr(G P) / tr(P). Squarings double the power; each is renormalised, or it would leave the range of float32.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from moe_erc.measures.weights import unit_rows
from moe_erc.numerics import divide

SQUARINGS = 10  # 1,024 power steps: sigma_max to 1e-5 for random gates, to log(min(D, F)) / 2,048 for any


def alignment(router_LED, w_gate_LEDF, mesh=None):
    """By expert, (L, E) float32; 0 for a zero row or a zero gate. One layer at a time in float32.

    With the mesh on which the gates lie, P(None, expert, None, data): a device's own experts, whole; split by expert.
    """
    if mesh is None:
        return lax.map(lambda layer: _of_layer(*layer), (router_LED, w_gate_LEDF))
    data, expert = mesh.axis_names

    def local(router_LJD, w_gate_LJDF):
        def layer(router_and_gates):
            router_JD, w_slice_JDF = router_and_gates
            return _of_layer(router_JD, lax.all_gather(w_slice_JDF, data, axis=2, tiled=True))

        # Devices along data have computed the same, which the type of what they gathered does not tell.
        return lax.pmax(lax.map(layer, (router_LJD, w_gate_LJDF)), data)

    specs = (P(None, expert), P(None, expert, None, data))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(None, expert))(router_LED, w_gate_LEDF)


def _of_layer(router_ED, w_gate_EDF):
    unit_ED, w_gate_EDF = unit_rows(router_ED), w_gate_EDF.astype(jnp.float32)
    response_EF = jnp.einsum("ed,edf->ef", unit_ED, w_gate_EDF, precision="highest")
    return divide(jnp.linalg.norm(response_EF, axis=-1), largest_singular_value(w_gate_EDF))


def largest_singular_value(w_EDF):
    """sigma_max of every matrix, (E,) float32, never above it by more than rounding; 0 for a matrix of zeros."""
    w_EDF = w_EDF.astype(jnp.float32)
    scale_E = jnp.max(jnp.abs(w_EDF), axis=(1, 2))
    w_EDF = divide(w_EDF, scale_E[:, None, None])  # squares of small weights would underflow
    product = "edf,egf->edg" if w_EDF.shape[1] <= w_EDF.shape[2] else "edf,edg->efg"
    gram_EGG = jnp.einsum(product, w_EDF, w_EDF, precision="highest")

    def square(_, power_EGG):
        power_EGG = divide(power_EGG, _trace(power_EGG)[:, None, None])
        return jnp.matmul(power_EGG, power_EGG, precision="highest")

    power_EGG = lax.fori_loop(0, SQUARINGS, square, gram_EGG)
    top_E = jnp.einsum("egh,ehg->e", gram_EGG, power_EGG, precision="highest")
    return scale_E * jnp.sqrt(divide(top_E, _trace(power_EGG)))


def _trace(matrix_EGG):
    return jnp.trace(matrix_EGG, axis1=1, axis2=2)
