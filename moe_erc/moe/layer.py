"""The MoE layer: it owns the parameters of the router and of the experts.

It knows of the router only what its record says (`routers/base.py`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from moe_erc.moe import experts, parallel, routing
from moe_erc.moe.routers.base import Parameter
from moe_erc.sharding import PARAMETERS, platform_of


@dataclasses.dataclass(frozen=True)
class Observation:
    """What the losses and measures of one layer may read."""

    x_BTD: jax.Array
    mask_BT: jax.Array
    scores: routing.Scores
    routing: routing.Routing
    # "hidden" (B, T, K, F) and "output" (B, T, K, D) of the chosen experts, as observers ask.
    kept: dict
    auxiliary: Any  # what the router tells a loss of its own: see `Choice.auxiliary`
    score: Callable  # x_BTD -> Scores
    # () -> Scores whose gradient reaches the router's own parameters, and nothing else.
    score_alone: Callable
    # An expert function of `experts.py` -> (summed, kept) of all experts on every token.
    run_all: Callable

    @property
    def chosen_BTK(self) -> jax.Array:
        """The slots that hold an expert, of unmasked tokens."""
        return routing.full_slots(
            self.routing, self.scores.probabilities_BTE.shape[-1], self.mask_BT
        )

    def unit_sum_BTD(self) -> jax.Array:
        """For every token the sum of the directions in which all experts answer."""
        summed, _ = self.run_all(experts.unit_output)
        return summed


def declare(config: Any) -> dict[str, Parameter]:
    """The layer's parameters, the router's first: the order decides what a seed draws."""
    E = config.experts
    D = config.width
    F = config.expert_width
    S = config.shared_experts * F
    rank = config.router.gate_rank(config)
    shapes = {"w_high": (E, rank, F)} if rank else {"w_gate": (E, D, F)}
    shapes |= {"w_up": (E, D, F), "w_down": (E, F, D)}
    if S:
        shapes |= {"shared_gate": (D, S), "shared_up": (D, S), "shared_down": (S, D)}
    declared = dict(config.router.parameters(config))
    for name, shape in shapes.items():
        declared[name] = Parameter(config.initializer, shape, PARAMETERS[name])
    return declared


class MoE(nn.Module):
    """(x_BTD, mask_BT, router_state) -> (y_BTD, RoutingStats, observed).

    The parameters are float32, as `declare` lists them.

    observers: for every value of `observed`, (its name, a function of the layer's `Observation`,
    the names that the function needs in `Observation.kept`).
    """

    config: Any  # ModelConfig
    mesh: Any = None
    observers: tuple = ()

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, mask_BT: jax.Array, router_state: Mapping
    ) -> tuple[jax.Array, routing.RoutingStats, dict]:
        config = self.config
        mesh = self.mesh
        router = config.router
        parameters = {}
        for name, declared in declare(config).items():
            parameters[name] = self.param(name, declared.initializer, declared.shape)
        names = experts.FACTORIZED if router.gate_rank(config) else experts.GATED
        matrices = {name: parameters[name].astype(config.dtype) for name in names}
        implementation = experts.implementation(config.experts_implementation, platform_of(mesh))

        def score(x_BTD):
            return router.score(config, mesh, parameters, x_BTD)

        def score_alone():
            # A router may read more than its own parameters: MPI's rows read the experts' gates.
            frozen = stop_others(parameters, router.parameters(config))
            return router.score(config, mesh, frozen, lax.stop_gradient(x_BTD))

        def run(expert, chosen, low_of_constant_BTEr=None):
            run_expert = partial(implementation, expert)
            return parallel.apply(
                run_expert, mesh, x_BTD, chosen, matrices, scored.low_BTEr, low_of_constant_BTEr
            )

        def run_all(expert):
            every_BTE = jnp.broadcast_to(jnp.arange(config.experts), scored.probabilities_BTE.shape)
            weights_BTE = jnp.ones_like(scored.probabilities_BTE)
            return run(expert, routing.Routing(weights_BTE, every_BTE))

        scored = score(x_BTD)
        scores, chosen, auxiliary = router.route(config, mesh, scored, router_state, run_all)
        if config.forced_balance:
            chosen = routing.even(scores.probabilities_BTE, config.experts_per_token)

        keep = names_to_keep(self.observers)
        low_of_constant_BTEr = None
        if scored.low_BTEr is not None and "output" in keep:
            # The kept output is constant in the token, but not in the first factor of the gate.
            low_of_constant_BTEr = score(lax.stop_gradient(x_BTD)).low_BTEr
        y_BTD, kept = run(partial(experts.weighed, keep=keep), chosen, low_of_constant_BTEr)
        if config.shared_experts:
            y_BTD += shared_experts(x_BTD, parameters, config.dtype)
        layer = Observation(
            x_BTD, mask_BT, scores, chosen, kept, auxiliary, score, score_alone, run_all
        )
        observed = {name: observe(layer) for name, observe, _ in self.observers}
        return y_BTD, routing.statistics(scores, chosen, mask_BT), observed


def stop_others(parameters: Mapping, own: Mapping) -> dict[str, jax.Array]:
    """The parameters; gradients reach those alone whose names are in `own`."""
    stopped = {}
    for name, leaf in parameters.items():
        stopped[name] = leaf if name in own else lax.stop_gradient(leaf)
    return stopped


def names_to_keep(observers: tuple) -> tuple[str, ...]:
    """What the observers need of the experts, each name once, sorted."""
    names = set()
    for _, _, names_of_one in observers:
        names |= set(names_of_one)
    return tuple(sorted(names))


def shared_experts(x_BTD: jax.Array, parameters: Mapping, dtype: Any) -> jax.Array:
    """S experts that every token meets, unweighed (DeepSeekMoE, arXiv 2401.06066), (B, T, D).

    Together they are one SwiGLU of width S F.
    """
    w_gate = parameters["shared_gate"].astype(dtype)
    w_up = parameters["shared_up"].astype(dtype)
    w_down = parameters["shared_down"].astype(dtype)
    return (jax.nn.silu(x_BTD @ w_gate) * (x_BTD @ w_up)) @ w_down
