"""Experts over a mesh: all-gather the tokens, run the local experts, scatter the sums back.

    x -> all_gather over "expert" -> local experts, dropless -> psum_scatter over "expert" -> y
    w -> all_gather over "data"                                 psum_scatter over "data" <- dw

Buffers are sized by tokens, not by how they are routed: memory does not depend on balance.
Statistics and losses are outside `shard_map` and see global arrays, so a mean is the mean over the
whole batch.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_erc.moe.routing import Routing
from moe_erc.sharding import BATCH, DATA, EXPERT, PARAMETERS, scatter_stages

# (B, T, E, …): every device has all tokens of its group, for its own experts.
BY_EXPERT = P(DATA, None, EXPERT)


def by_token(function: Callable, mesh: Mesh | None) -> Callable:
    """`function`, which works token by token on arrays (B, T, …), on every device's own tokens.

    Without it XLA would gather the arrays for operations that it cannot cut.
    """
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=P(BATCH), out_specs=P(BATCH))


def apply(
    run: Callable,
    mesh: Mesh | None,
    x_BTD: jax.Array,
    routing: Routing,
    matrices: Mapping,
    low_BTEr: jax.Array | None = None,
    low_of_constant_BTEr: jax.Array | None = None,
) -> tuple[Any, Any]:
    """(summed (B, T, …), kept (B, T, K, …)) of the experts that the tokens are routed to.

    run: an implementation of `experts.py` with its expert function bound to it.
    mesh: None means one device.
    low_BTEr: what `project` made, for experts that go on from there.
    low_of_constant_BTEr: what `project` made of constant tokens, where their outputs are kept.
    """
    lows = {}
    if low_BTEr is not None:
        lows["low"] = low_BTEr
    if low_of_constant_BTEr is not None:
        lows["low_of_constant"] = low_of_constant_BTEr
    if mesh is None:
        return _flat(run, x_BTD, routing, matrices, lows)
    slices = {name: PARAMETERS[name] for name in matrices}
    stages = scatter_stages(mesh)

    def gather(x_BTD, routing, matrices):
        # The matrices are gathered in here, not at the boundary: their gradient is then summed and
        # cut again by reduce-scatters.
        whole = {}
        for name, leaf in matrices.items():
            whole[name] = _whole(leaf, slices[name].index(DATA), stages)
        # Experts are numbered from this device's first one; other devices' fall out of [0, E).
        first = lax.axis_index(EXPERT) * len(whole["w_down"])
        gathered = Routing(
            weights_BTK=_gather(routing.weights_BTK, EXPERT, 0),
            experts_BTK=_gather(routing.experts_BTK, EXPERT, 0) - first,
        )
        return _gather(x_BTD, EXPERT, 0), gathered, whole

    def compute(x_BTD, routing, matrices, lows):
        return _flat(run, x_BTD, routing, matrices, lows)

    def scatter(results):
        return jax.tree.map(_scatter, results)

    # Kernels of libraries do not pass the replication check. What they read and write is every
    # device's own, so without it no sum over devices can be wrong there. Collectives are checked.
    over_mesh = partial(jax.shard_map, mesh=mesh, out_specs=P(BATCH))
    gathered = over_mesh(gather, in_specs=(P(BATCH), P(BATCH), slices))(x_BTD, routing, matrices)
    own = (P(BATCH), P(BATCH), P(BATCH), BY_EXPERT)
    results = over_mesh(compute, in_specs=own, check_vma=False)(*gathered, lows)
    return over_mesh(scatter, in_specs=P(BATCH))(results)


def project(mesh: Mesh | None, x_BTD: jax.Array, w_low_EDr: jax.Array, spec: P) -> jax.Array:
    """x @ w_low of every expert, (B, T, E, r) float32; each expert's lies where its matrices do.

    spec: where w_low lies.

    Experts are chosen by the result. float32 inputs are therefore not rounded to bfloat16 on a TPU;
    bfloat16 inputs are exact in one pass.
    """

    def local(x_BTD, w_low_EDr):
        exact = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
        return jnp.einsum("btd,edr->bter", x_BTD, w_low_EDr, **exact)

    if mesh is None:
        return local(x_BTD, w_low_EDr)
    stages = scatter_stages(mesh)

    def gathered(x_BTD, w_low_EDr):
        return local(_gather(x_BTD, EXPERT, 0), _whole(w_low_EDr, spec.index(DATA), stages))

    over_mesh = jax.shard_map(gathered, mesh=mesh, in_specs=(P(BATCH), spec), out_specs=BY_EXPERT)
    return over_mesh(x_BTD, w_low_EDr)


def _gather(leaf, name, axis):
    """All slices of a leaf along `axis`, from the devices of a mesh axis."""
    # Over a mesh axis of one device XLA:CPU would copy leaf and gradient for nothing.
    if lax.axis_size(name) == 1:
        return leaf
    return lax.all_gather(leaf, name, axis=axis, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _whole(leaf, axis, stages):
    """All slices of a matrix along `axis`; its gradient is summed and cut in `stages`."""
    return _gather(leaf, DATA, axis)


def _whole_forward(leaf, axis, stages):
    return _whole(leaf, axis, stages), None


def _whole_backward(axis, stages, _, gradient):
    if lax.axis_size(DATA) == 1:
        return (gradient,)
    for groups in stages:
        gradient = lax.psum_scatter(
            gradient, DATA, scatter_dimension=axis, axis_index_groups=groups, tiled=True
        )
    return (gradient,)


_whole.defvjp(_whole_forward, _whole_backward)


def _scatter(leaf):
    """The sum over the expert axis, of which each device keeps its own sequences."""
    if lax.axis_size(EXPERT) == 1:
        return leaf
    return lax.psum_scatter(leaf, EXPERT, tiled=True)


def _flat(run, x_BTD, routing, matrices, lows):
    """`run` on tokens without the axes (B, T): implementations know N tokens alone."""
    weights_NK = routing.weights_BTK.reshape(-1, routing.weights_BTK.shape[-1])
    experts_NK = routing.experts_BTK.reshape(-1, routing.experts_BTK.shape[-1])
    assigned = {"weight": weights_NK}
    for name, low_BTEr in lows.items():
        low_NEr = low_BTEr.reshape(-1, *low_BTEr.shape[2:])
        tokens_N1 = jnp.arange(len(low_NEr))[:, None]
        assigned[name] = low_NEr.at[tokens_N1, experts_NK].get(mode="fill", fill_value=0)
    results = run(x_BTD.reshape(-1, x_BTD.shape[-1]), assigned, experts_NK, matrices)

    def by_sequence(leaf):
        return leaf.reshape(*x_BTD.shape[:2], *leaf.shape[1:])

    return jax.tree.map(by_sequence, results)
