"""Experts over a mesh: gather the tokens of an expert group, run the local experts on them, scatter the sums back.

    x -> all_gather over "expert" -> local experts, dropless -> psum_scatter over "expert" -> y

Only this is inside `shard_map`: routing, statistics and losses see global arrays, so their means are what they say.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from moe_erc.sharding import BATCH, DATA, EXPERT


def apply(experts, mesh, x_BTD, routing, expert_weights):
    """`experts` (a function of `experts.py`) on every token, (B, T, D), whatever the mesh; None means one device."""
    if mesh is None:
        return _flat(experts, x_BTD, routing, expert_weights)

    def local(x_BTD, routing, expert_weights):
        # One cast here is one sum of the weight gradient over the data axis, after the loop and not in it.
        expert_weights = jax.tree.map(lambda leaf: lax.pcast(leaf, DATA, to="varying"), expert_weights)
        x_BTD, routing = jax.tree.map(lambda leaf: lax.all_gather(leaf, EXPERT, tiled=True), (x_BTD, routing))
        first = lax.axis_index(EXPERT) * len(expert_weights[0])
        routing = routing._replace(experts_BTK=routing.experts_BTK - first)
        y_BTD = _flat(experts, x_BTD, routing, expert_weights)
        return lax.psum_scatter(y_BTD, EXPERT, tiled=True)

    specs = (P(BATCH), P(BATCH), P(EXPERT))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(BATCH))(x_BTD, routing, expert_weights)


def _flat(experts, x_BTD, routing, expert_weights):
    weights_NK, experts_NK = (leaf.reshape(-1, leaf.shape[-1]) for leaf in routing)
    y_ND = experts(x_BTD.reshape(-1, x_BTD.shape[-1]), weights_NK, experts_NK, expert_weights)
    return jnp.reshape(y_ND, x_BTD.shape)
