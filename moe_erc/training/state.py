"""The smallest struct that restores a run; the position in the data is its step."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from moe_erc.sharding import shard_state


class TrainState(struct.PyTreeNode):
    """Everything a step reads and writes."""

    step: jax.Array  # int32, optimizer steps done
    params: Any
    opt_state: Any
    rng: jax.Array  # typed key; step s draws from fold_in(rng, s)


def init_params(model, rng):
    """The model's initial parameters, float32, the same on any mesh."""
    tokens_BT = jnp.zeros((model.mesh.size, 1), jnp.int32)  # the least that every device gets a share of
    return model.init(rng, tokens_BT, jnp.ones_like(tokens_BT, bool))["params"]


def initializer(model, optimizer, seed):
    """() -> TrainState of step 0."""

    def init():
        params_rng, rng = jax.random.split(jax.random.key(seed))
        params = init_params(model, params_rng)
        return TrainState(jnp.int32(0), params, optimizer.init(params), rng)

    return init


def abstract_state(init, mesh):
    """Shapes, types and shardings of the state that `init` makes, without making it."""
    return shard_state(mesh, jax.eval_shape(init))


def shardings(abstract):
    """Where each leaf of an abstract state lies."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def create_state(init, abstract):
    """The initial state, born on its devices."""
    return jax.jit(init, out_shardings=shardings(abstract))()
