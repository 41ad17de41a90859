"""The smallest struct that restores a run; the position in the data is its step."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from moe_erc.random_keys import named
from moe_erc.sharding import shard_state
from moe_erc.training import guard


class Weights(struct.PyTreeNode):
    """The part of a TrainState that a model is evaluated with."""

    params: Any
    router: Any  # what routing carries from step to step beside its parameters: `RouterState.by_layer`


class TrainState(struct.PyTreeNode):
    """Everything a step reads and writes."""

    step: jax.Array  # int32, optimizer steps done
    params: Any
    opt_state: Any
    rng: jax.Array  # typed key; step s draws from fold_in(rng, s)
    router: Any
    loss_scales: Any  # {loss: factor of its weight}
    guard: Any  # what is remembered of earlier losses and skipped steps: `guard.py`

    @property
    def weights(self):
        """What the model is evaluated with."""
        return Weights(self.params, self.router)


def init_weights(model, rng):
    """The model's initial parameters, float32, the same on any mesh."""
    tokens_BT = jnp.zeros((model.mesh.size, 1), jnp.int32)  # the least that every device gets a share of
    router = model.config.router.init_state(model.config).by_layer
    variables = model.init(rng, tokens_BT, jnp.ones_like(tokens_BT, bool), router)
    return Weights(variables["params"], router)


def initializer(model, optimizer, seed, objective=None):
    """(params=None) -> TrainState of step 0, with parameters that are drawn if none are given.

    objective: whose losses may be weighed by their value at step 0: `Objective.scales_at_init`.
    """

    def init(params=None):
        key = jax.random.key(seed)
        rng = named(key, "steps")
        weights = init_weights(model, named(key, "parameters"))
        if params is not None:
            weights = weights.replace(params=params)
        loss_scales = model.config.router.init_state(model.config).loss_scales
        if objective is not None:
            loss_scales = loss_scales | objective.scales_at_init(weights.params, jax.random.fold_in(rng, 0))
        opt_state = optimizer.init(weights.params)
        return TrainState(jnp.int32(0), weights.params, opt_state, rng, weights.router, loss_scales, guard.initial())

    return init


def abstract_state(init, model):
    """Shapes, types and shardings of the state of `model` that `init` makes, without making it."""
    router_parameters = model.config.router.parameters(model.config)
    return shard_state(model.mesh, jax.eval_shape(init), router_parameters)


def shardings(abstract):
    """Where each leaf of an abstract state lies."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def create_state(init, abstract, params=None):
    """The initial state, born on its devices; with `params`, if they are given, for its parameters.

    Those that `init` would draw are then no output of its program, which does not draw them: moments start at zero
    whatever the parameters are.
    """
    if params is None:
        return jax.jit(init, out_shardings=shardings(abstract))()
    without = shardings(abstract.replace(params=None))
    others = jax.jit(lambda given: init(given).replace(params=None), out_shardings=without)
    return others(params).replace(params=params)
