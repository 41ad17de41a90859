"""The state of a run: the smallest struct that restores it; its step says where the data go on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from moe_erc.model.transformer import Transformer
from moe_erc.random_keys import named
from moe_erc.sharding import shard_state
from moe_erc.training import guard


class Weights(struct.PyTreeNode):
    """The part of a TrainState that a model is evaluated with."""

    params: Any
    # What routing carries from step to step beside its parameters: `RouterState.by_layer`.
    router: Any


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
    def weights(self) -> Weights:
        """The part that the model is evaluated with."""
        return Weights(self.params, self.router)


def init_weights(model: Transformer, rng: jax.Array) -> Weights:
    """The model's initial parameters, float32, the same on any mesh."""
    # One sequence per device is the least that can be split over the mesh.
    tokens_BT = jnp.zeros((model.mesh.size, 1), jnp.int32)
    router = model.config.router.init_state(model.config).by_layer
    variables = model.init(rng, tokens_BT, jnp.ones_like(tokens_BT, bool), router)
    return Weights(variables["params"], router)


def initializer(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    seed: int,
    objective: Any = None,
) -> Callable[..., TrainState]:
    """(params=None) -> TrainState of step 0; parameters that are not given are drawn.

    objective: whose losses may be weighed by their value at step 0: `Objective.scales_at_init`.
    """

    def init(params=None):
        key = jax.random.key(seed)
        rng = named(key, "steps")
        weights = init_weights(model, named(key, "parameters"))
        if params is not None:
            given = flatten_dict(weights.params) | flatten_dict(params)
            weights = weights.replace(params=unflatten_dict(given))
        loss_scales = model.config.router.init_state(model.config).loss_scales
        if objective is not None:
            loss_scales = loss_scales | objective.scales_at_init(
                weights.params, jax.random.fold_in(rng, 0)
            )
        opt_state = optimizer.init(weights.params)
        return TrainState(
            step=jnp.int32(0),
            params=weights.params,
            opt_state=opt_state,
            rng=rng,
            router=weights.router,
            loss_scales=loss_scales,
            guard=guard.initial(),
        )

    return init


def abstract_state(init: Callable, model: Transformer) -> TrainState:
    """Shapes, types and shardings of the state of `model` that `init` makes, without making it."""
    router_parameters = model.config.router.parameters(model.config)
    return shard_state(model.mesh, jax.eval_shape(init), router_parameters)


def shardings(abstract: Any) -> Any:
    """A tree with the sharding of each leaf of an abstract state."""

    def of_leaf(leaf):
        return leaf.sharding

    return jax.tree.map(of_leaf, abstract)


def create_state(init: Callable, abstract: TrainState, params: Any = None) -> TrainState:
    """The initial state, made on its devices.

    params: those parameters that are not to be drawn, in their places of the tree. The optimizer's
        moments start at zero whatever the parameters are.
    """
    if params is None:
        return jax.jit(init, out_shardings=shardings(abstract))()
    given = flatten_dict(params)

    def without_given(state):
        leaves = flatten_dict(state.params).items()
        return state.replace(params={path: leaf for path, leaf in leaves if path not in given})

    def make(params):
        # What is no output of the program is not computed: given parameters are not drawn.
        return without_given(init(params))

    state = jax.jit(make, out_shardings=shardings(without_given(abstract)))(params)
    return state.replace(params=unflatten_dict(state.params | given))
