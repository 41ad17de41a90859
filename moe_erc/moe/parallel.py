"""Experts over a mesh: gather the tokens of an expert group, run the local experts on them, scatter the sums back.

    x -> all_gather over "expert" -> local experts, dropless -> psum_scatter over "expert" -> y
    w -> all_gather over "data"                                 psum_scatter over "data" <- dw

Buffers are sized by tokens, not by how they are routed: memory does not depend on balance.
Statistics and losses are outside `shard_map` and see global arrays, so their means are what they
say.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_erc.moe.routing import Routing
from moe_erc.sharding import BATCH, DATA, EXPERT, PARAMETERS

BY_EXPERT = P(
    DATA, None, EXPERT
)  # (B, T, E, …): every device has all tokens of its group for its own experts


def by_token(function: Callable, mesh: Mesh | None) -> Callable:
    """`function`, of arrays (B, T, …) token by token, on every device's own: XLA would gather what it cannot cut."""
    return (
        function
        if mesh is None
        else jax.shard_map(function, mesh=mesh, in_specs=P(BATCH), out_specs=P(BATCH))
    )


def apply(
    run: Callable,
    mesh: Mesh | None,
    x_BTD: jax.Array,
    routing: Routing,
    matrices: Mapping,
    low_BTEr: jax.Array | None = None,
    low_of_constant_BTEr: jax.Array | None = None,
) -> tuple[Any, Any]:
    """(summed (B, T, …), kept (B, T, K, …)) of `run`, an implementation of `experts.py` with its expert bound to it.

    `low_BTEr` is what `project` made, for experts that go on from there, and `low_of_constant_BTEr`
    what it made of constant tokens, where their outputs are kept. mesh: None means one device.
    """
    lows = {"low": low_BTEr, "low_of_constant": low_of_constant_BTEr}
    lows = {name: low for name, low in lows.items() if low is not None}
    if mesh is None:
        return _flat(run, x_BTD, routing, matrices, lows)
    slices = {name: PARAMETERS[name] for name in matrices}

    def local(x_BTD, routing, matrices, lows):
        # Gathered here rather than on the way in, the gradient is summed and cut again in one
        # reduce-scatter.
        matrices = {
            name: _gather(leaf, DATA, slices[name].index(DATA)) for name, leaf in matrices.items()
        }
        x_BTD, routing = jax.tree.map(lambda leaf: _gather(leaf, EXPERT, 0), (x_BTD, routing))
        first = lax.axis_index(EXPERT) * len(matrices["w_down"])
        routing = routing._replace(experts_BTK=routing.experts_BTK - first)
        results = _flat(run, x_BTD, routing, matrices, lows)
        return jax.tree.map(_scatter, results)

    specs = (P(BATCH), P(BATCH), slices, BY_EXPERT)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(BATCH))(
        x_BTD, routing, matrices, lows
    )


def project(mesh: Mesh | None, x_BTD: jax.Array, w_low_EDr: jax.Array, spec: P) -> jax.Array:
    """x @ w_low of every expert, (B, T, E, r) float32, each expert's where its matrices are.

    spec: where w_low lies. Experts are chosen by the result, so that float32 is not rounded to
    bfloat16 on a TPU; bfloat16 is exact in one pass.
    """

    def local(x_BTD, w_low_EDr):
        exact = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
        return jnp.einsum("btd,edr->bter", x_BTD, w_low_EDr, **exact)

    if mesh is None:
        return local(x_BTD, w_low_EDr)

    def gathered(x_BTD, w_low_EDr):
        return local(_gather(x_BTD, EXPERT, 0), _gather(w_low_EDr, DATA, spec.index(DATA)))

    return jax.shard_map(gathered, mesh=mesh, in_specs=(P(BATCH), spec), out_specs=BY_EXPERT)(
        x_BTD, w_low_EDr
    )


def _gather(leaf, name, axis):
    """All slices along `axis`.

    Over a mesh axis of one device XLA:CPU would copy leaf and gradient for nothing.
    """
    return lax.all_gather(leaf, name, axis=axis, tiled=True) if lax.axis_size(name) > 1 else leaf


def _scatter(leaf):
    return lax.psum_scatter(leaf, EXPERT, tiled=True) if lax.axis_size(EXPERT) > 1 else leaf


def _flat(run, x_BTD, routing, matrices, lows):
    weights_NK, experts_NK = (leaf.reshape(-1, leaf.shape[-1]) for leaf in routing)
    assigned = {"weight": weights_NK}
    for name, low_BTEr in lows.items():
        low_NEr = low_BTEr.reshape(-1, *low_BTEr.shape[2:])
        tokens_N1 = jnp.arange(len(low_NEr))[:, None]
        assigned[name] = low_NEr.at[tokens_N1, experts_NK].get(mode="fill", fill_value=0)
    results = run(x_BTD.reshape(-1, x_BTD.shape[-1]), assigned, experts_NK, matrices)
    return jax.tree.map(lambda leaf: leaf.reshape(*x_BTD.shape[:2], *leaf.shape[1:]), results)
