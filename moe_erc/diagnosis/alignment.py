"""How much of the strongest direction of its expert's gate a router row holds (arXiv 2606.12397).

    alignment = |r @ W| / (|r| sigma_max(W))

It is in [0, 1], and 1 if r is the first left singular vector of the gate.

sigma_max is found without an SVD, which is slow on TPUs. For the Gram matrix G of W, the power
P = G^(2^s) is nearly of rank 1, and sigma_max^2 = tr(G P) / tr(P). Each squaring doubles the power.
Each is renormalised, because it would leave the range of float32 otherwise.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from moe_erc.measures.weights import unit_rows
from moe_erc.numerics import divide

# Ten squarings are 1,024 power steps. The relative error of sigma_max is then 1e-5 for random gates
# and at most log(min(D, F)) / 2,048 for any gate.
SQUARINGS = 10


def alignment(
    router_LED: jax.Array, w_gate_LEDF: jax.Array, mesh: jax.sharding.Mesh | None = None
) -> jax.Array:
    """The alignment of every expert, (L, E) float32; 0 for a zero row or a zero gate.

    One layer at a time is in float32. `mesh` is the one on which the gates lie as
    P(None, expert, None, data). Each device then gathers its own experts whole, and the result is
    split by expert.
    """
    if mesh is None:
        return lax.map(_of_layer, (router_LED, w_gate_LEDF))
    data, expert = mesh.axis_names

    def local(router_LJD, w_gate_LJDF):
        def layer(router_and_gates):
            router_JD, w_slice_JDF = router_and_gates
            w_gate_JDF = lax.all_gather(w_slice_JDF, data, axis=2, tiled=True)
            return _of_layer((router_JD, w_gate_JDF))

        # Devices along `data` have computed the same values, but the type of a gathered array does
        # not say so. The maximum of equal values makes it known.
        return lax.pmax(lax.map(layer, (router_LJD, w_gate_LJDF)), data)

    specs = (P(None, expert), P(None, expert, None, data))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(None, expert))(
        router_LED, w_gate_LEDF
    )


def _of_layer(router_and_gates):
    router_ED, w_gate_EDF = router_and_gates
    unit_ED = unit_rows(router_ED)
    w_gate_EDF = w_gate_EDF.astype(jnp.float32)
    response_EF = jnp.einsum("ed,edf->ef", unit_ED, w_gate_EDF, precision="highest")
    return divide(jnp.linalg.norm(response_EF, axis=-1), largest_singular_value(w_gate_EDF))


def largest_singular_value(w_EDF: jax.Array) -> jax.Array:
    """sigma_max of every matrix, (E,) float32; 0 for a matrix of zeros.

    The value exceeds sigma_max by no more than rounding.
    """
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
