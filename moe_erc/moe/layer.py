"""The MoE layer: owns the router's and the experts' parameters, and calls the functions that use them."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from moe_erc.moe import experts, parallel, routing
from moe_erc.moe.routers import ROUTERS, competition


class Competition(NamedTuple):
    """Whether the layer's experts compete on this step, and the softmax of their answers (zeros if not)."""

    active: jax.Array  # bool
    competitors_BTE: jax.Array


@dataclasses.dataclass(frozen=True)
class Observation:
    """What the losses and measures of one layer may read."""

    x_BTD: jax.Array
    mask_BT: jax.Array
    scores: routing.Scores
    routing: routing.Routing
    kept: dict  # "hidden" (B, T, K, F) and "output" (B, T, K, D) of the chosen experts, as observers ask for them
    competition: Competition | None  # where the router is "competition" and the model is being trained
    score: Callable  # x_BTD -> Scores
    score_alone: Callable  # () -> Scores whose gradient reaches the router's own parameters, and nothing else
    run_all: Callable  # an expert function of `experts.py` -> (summed, kept) of all experts on every token

    @property
    def chosen_BTK(self):
        """The slots that hold an expert, of unmasked tokens."""
        return routing.full_slots(self.routing, self.scores.probabilities_BTE.shape[-1], self.mask_BT)

    def unit_sum_BTD(self):
        """For every token the sum of the directions in which all experts answer."""
        return self.run_all(experts.unit_output)[0]


def declare(config):
    """{name: (initializer, shape)} of the layer's parameters."""
    E, D, F, S = config.experts, config.width, config.expert_width, config.shared_experts * config.expert_width
    gate = {"w_high": (E, config.gate_rank, F)} if config.gate_rank else {"w_gate": (E, D, F)}
    shared = {"shared_gate": (D, S), "shared_up": (D, S), "shared_down": (S, D)} if S else {}
    shapes = gate | {"w_up": (E, D, F), "w_down": (E, F, D)} | shared
    return ROUTERS[config.router].declare(config) | {name: (config.initializer, of) for name, of in shapes.items()}


class MoE(nn.Module):
    """x_BTD -> (y_BTD, RoutingStats, observed). Float32 parameters as `declare` has them.

    observers: (name, function of the layer's `Observation`, what it needs kept) for every value of `observed`.
    """

    config: Any  # ModelConfig
    mesh: Any = None
    observers: tuple = ()

    @nn.compact
    def __call__(self, x_BTD, mask_BT, router_state):
        config, mesh, router = self.config, self.mesh, ROUTERS[self.config.router]
        parameters = {name: self.param(name, *declared) for name, declared in declare(config).items()}
        names = experts.FACTORIZED if config.gate_rank else experts.GATED
        matrices = {name: parameters[name].astype(config.dtype) for name in names}
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        implementation = experts.implementation(config.experts_implementation, platform)

        def score(x_BTD):
            return router.score(config, mesh, parameters, x_BTD)

        def score_alone():
            # MPI's rows read the gates as well, which are the experts': only what the router declares is its own.
            own = router.declare(config)
            frozen = {name: leaf if name in own else lax.stop_gradient(leaf) for name, leaf in parameters.items()}
            return router.score(config, mesh, frozen, lax.stop_gradient(x_BTD))

        def run(expert, chosen, low_of_constant_BTEr=None):
            lows = scores.low_BTEr, low_of_constant_BTEr
            return parallel.apply(partial(implementation, expert), mesh, x_BTD, chosen, matrices, *lows)

        def run_all(expert):
            every_BTE = jnp.broadcast_to(jnp.arange(config.experts), scores.probabilities_BTE.shape)
            return run(expert, routing.Routing(jnp.ones_like(scores.probabilities_BTE), every_BTE))

        scores = score(x_BTD)
        preference_BTE = scores.probabilities_BTE
        if "bias" in router_state:
            preference_BTE += router_state["bias"]
        choose = parallel.by_token(partial(router.choose, config=config), mesh)
        chosen = choose(scores.probabilities_BTE, preference_BTE)
        competing = None
        if "competing" in router_state:
            chosen, competing = _compete(config, mesh, router_state["competing"], run_all, chosen, scores)
            balance_BTE = jnp.where(competing.active, competing.competitors_BTE, scores.balance_BTE)
            scores = scores._replace(balance_BTE=balance_BTE)

        keep = tuple(sorted({name for _, _, needed in self.observers for name in needed}))
        low_of_constant_BTEr = None
        if config.gate_rank and "output" in keep:
            # Of constant tokens, the first factor of the gate is still a parameter of the expert's output.
            low_of_constant_BTEr = score(lax.stop_gradient(x_BTD)).low_BTEr
        y_BTD, kept = run(partial(experts.weighed, keep=keep), chosen, low_of_constant_BTEr)
        if config.shared_experts:
            y_BTD += shared_experts(x_BTD, parameters, config.dtype)
        layer = Observation(x_BTD, mask_BT, scores, chosen, kept, competing, score, score_alone, run_all)
        observed = {name: observe(layer) for name, observe, _ in self.observers}
        return y_BTD, routing.statistics(scores, chosen, mask_BT), observed


def shared_experts(x_BTD, parameters, dtype):
    """S experts that every token meets, unweighed (DeepSeekMoE, arXiv 2401.06066): one SwiGLU of width S F."""
    w_gate, w_up, w_down = (parameters[name].astype(dtype) for name in ("shared_gate", "shared_up", "shared_down"))
    return (jax.nn.silu(x_BTD @ w_gate) * (x_BTD @ w_up)) @ w_down


def _compete(config, mesh, competing, run_all, chosen, scores):
    """(Routing, Competition): to the winners where the layer competes, as chosen elsewhere."""

    def compete():
        winners = parallel.by_token(partial(competition.winners, experts_per_token=config.experts_per_token), mesh)
        return winners(run_all(experts.affinity)[1])

    def rest():
        return chosen, jnp.zeros_like(scores.probabilities_BTE)

    chosen, competitors_BTE = lax.cond(competing, compete, rest)
    return chosen, Competition(competing, competitors_BTE)
