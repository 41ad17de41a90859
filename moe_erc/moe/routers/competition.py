"""CompeteSMoE (v2, arXiv 2505.13380): the router learns which experts win a competition.

    a_e     = mean softplus(expert_e(x))
    q       = softmax(a)
    experts = top K of q
    weights = a[experts] / sum

On a step on which a layer does not compete, the router is a softmax router.
`losses/competition.py` draws it towards q. The layers that compete are drawn on every step, from
the step's key; where more are drawn than are allowed, the excess does not compete. In a layer that
competes, the balance loss reads q, because q routed the tokens. A layer that competes computes all
experts, and that price is part of the comparison.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from moe_erc.checks import within
from moe_erc.moe import experts, parallel
from moe_erc.moe.routers.base import Choice
from moe_erc.moe.routers.softmax import LinearRouter
from moe_erc.moe.routing import Routing, Scores, shares
from moe_erc.random_keys import named


class CompetitionResult(NamedTuple):
    """Whether experts compete in the layer on this step, and the softmax of their answers or 0."""

    active: jax.Array  # bool
    competitors_BTE: jax.Array


def winners(affinity_BTE: jax.Array, experts_per_token: int) -> tuple[Routing, jax.Array]:
    """(Routing to the experts that answer most, q), from the affinities of all experts."""
    weights_BTK, experts_BTK = lax.top_k(affinity_BTE, experts_per_token)
    return Routing(shares(weights_BTK), experts_BTK), jax.nn.softmax(affinity_BTE, axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Competition(LinearRouter):
    """A softmax router whose experts compete in some layers of a training step.

    In these layers it does not choose by probability, so it has neither top_p nor a bias.
    """

    name: ClassVar[str] = "competition"
    is_softmax: ClassVar[bool] = True
    competes: ClassVar[bool] = True
    # The probability that the experts of a layer compete on a step.
    rate: float = within(0, 1, default=0.07)
    # In how many layers at most they compete on the same step.
    max_layers: int = within(least=1, default=3)

    def before_step(self, config: Any, by_layer: dict, rng: jax.Array) -> dict:
        competing_L = self.competing_layers(config, named(rng, "competing layers"))
        return by_layer | {"competing": competing_L}

    def competing_layers(self, config: Any, rng: jax.Array) -> jax.Array:
        """(L,) bool: every layer with the same probability, but no more than `max_layers` of them.

        Where more layers are drawn, those with the highest draws are dropped, which may be any.
        """
        draw_L = jax.random.uniform(rng, (config.layers,))
        rank_L = jnp.argsort(jnp.argsort(draw_L))
        return (draw_L < self.rate) & (rank_L < self.max_layers)

    def route(
        self, config: Any, mesh: Mesh | None, scores: Scores, state: Mapping, run_all: Callable
    ) -> Choice:
        """Tokens go to the winners where the layer competes, elsewhere to the most probable."""
        usual = super().route(config, mesh, scores, state, run_all)
        if "competing" not in state:
            return usual
        competing = state["competing"]

        def compete():
            _, affinity_BTE = run_all(experts.affinity)
            by_affinity = functools.partial(winners, experts_per_token=config.experts_per_token)
            return parallel.by_token(by_affinity, mesh)(affinity_BTE)

        def rest():
            return usual.routing, jnp.zeros_like(scores.probabilities_BTE)

        routing, competitors_BTE = lax.cond(competing, compete, rest)
        balance_BTE = jnp.where(competing, competitors_BTE, scores.balance_BTE)
        result = CompetitionResult(competing, competitors_BTE)
        return Choice(scores._replace(balance_BTE=balance_BTE), routing, result)

    def expected_share(self, config: Any) -> float:
        """The share of layers that compete on a step, on average, under the limit `max_layers`."""
        layers = config.layers
        expected = 0.0
        for count in range(layers + 1):
            # The binomial probability that so many layers are drawn.
            ways = math.comb(layers, count)
            probability = ways * self.rate**count * (1 - self.rate) ** (layers - count)
            expected += min(count, self.max_layers) * probability
        return expected / layers

    def flops(self, config: Any) -> float:
        """Those of a softmax router, and those of all experts by the share of competing layers."""
        all_experts = 2 * 3 * config.experts * config.width * config.expert_width
        return super().flops(config) + self.expected_share(config) * all_experts

    def describe(self, config: Any) -> str:
        return (
            f"Router: softmax, the top {config.experts_per_token} of {config.experts} experts, "
            "taught by experts that competed (CompeteSMoE)."
        )
