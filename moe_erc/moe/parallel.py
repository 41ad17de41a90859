"""Experts over a mesh: gather the tokens of an expert group, run the local experts on them, scatter the sums back.

    x -> all_gather over "expert" -> local experts, dropless -> psum_scatter over "expert" -> y
    w -> all_gather over "data"                                 psum_scatter over "data" <- dw

Buffers are sized by tokens, not by how they are routed: memory does not depend on balance. Statistics and losses are
outside `shard_map` and see global arrays, so their means are what they say.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from moe_erc.moe.experts import ExpertWeights
from moe_erc.sharding import BATCH, DATA, EXPERT, PARAMETERS


def by_token(function, mesh):
    """`function`, of arrays (B, T, …) token by token, on every device's own: XLA would gather what it cannot cut."""
    return function if mesh is None else jax.shard_map(function, mesh=mesh, in_specs=P(BATCH), out_specs=P(BATCH))


def apply(experts, mesh, x_BTD, routing, expert_weights):
    """`experts` (a function of `experts.py`) on every token, (B, T, D), whatever the mesh; None means one device."""
    if mesh is None:
        return _flat(experts, x_BTD, routing, expert_weights)
    slices = ExpertWeights(PARAMETERS["w_gate"], PARAMETERS["w_up"], PARAMETERS["w_down"])

    def local(x_BTD, routing, expert_weights):
        # Gathered here rather than on the way in, the gradient is summed and cut again in one reduce-scatter.
        expert_weights = jax.tree.map(lambda leaf, spec: _gather(leaf, DATA, spec.index(DATA)), expert_weights, slices)
        x_BTD, routing = jax.tree.map(lambda leaf: _gather(leaf, EXPERT, 0), (x_BTD, routing))
        first = lax.axis_index(EXPERT) * len(expert_weights.w_gate_EDF)
        routing = routing._replace(experts_BTK=routing.experts_BTK - first)
        y_BTD = _flat(experts, x_BTD, routing, expert_weights)
        return lax.psum_scatter(y_BTD, EXPERT, tiled=True) if lax.axis_size(EXPERT) > 1 else y_BTD

    specs = (P(BATCH), P(BATCH), slices)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(BATCH))(x_BTD, routing, expert_weights)


def _gather(leaf, name, axis):
    """All slices along `axis`. Over a mesh axis of one device XLA:CPU would copy leaf and gradient for nothing."""
    return lax.all_gather(leaf, name, axis=axis, tiled=True) if lax.axis_size(name) > 1 else leaf


def _flat(experts, x_BTD, routing, expert_weights):
    weights_NK, experts_NK = (leaf.reshape(-1, leaf.shape[-1]) for leaf in routing)
    y_ND = experts(x_BTD.reshape(-1, x_BTD.shape[-1]), weights_NK, experts_NK, expert_weights)
    return jnp.reshape(y_ND, x_BTD.shape)
