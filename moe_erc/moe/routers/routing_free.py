"""Routing-free MoE (arXiv 2604.00801): every expert decides by itself whether it runs on a token.

    g_e = relu(|x @ w_low[e]| - threshold[e]),   active where g_e >= theta
    y = sum_active g_e expert_e(x)

How many experts a token meets is not fixed: a controller raises the weight of the balance loss
while more than K of them do, and lowers it while fewer. That loss reads g times the token's number
of experts over K, a constant: where many run they are pushed most, or one layer's experts would run
for all. With load_e the share of all assignments that expert e has, it is E sum_e load_e mean_n(g_e
n_experts / K). Thresholds begin at the length to be expected of a normalised token. The paper's two
losses, L_EB + L_TB with lambda_0 1e-10, are not offered. The gate of an expert is factorised as in
AoE, and w_low is its first factor.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from moe_erc.checks import within
from moe_erc.moe.routers.aoe import Factorized
from moe_erc.moe.routers.base import Parameter, RouterState
from moe_erc.moe.routing import Routing, Scores, StepCounts

LOW_BITS = 15  # of the halves in which numbers are added that an int32 does not hold the sum of


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingFree(Factorized):
    """Gates in place of probabilities. Its state is the controller's: {"load_balance": scalar}, a
    scale of that loss.
    """

    name: ClassVar[str] = "routing_free"
    # The least gate with which an expert runs.
    theta: float = within(above=0, default=0.05)
    # By how much a step may change the weight of the balance loss, as a share of it.
    controller_rate: float = within(least=0, default=0.02)

    def parameters(self, config: Any) -> dict[str, Parameter]:
        """The first factors, and thresholds at the length to be expected of a normalised token:
        half of them run.
        """
        expected = config.init_std * (config.width * self.gate_rank(config)) ** 0.5
        threshold = Parameter(nn.initializers.constant(expected), (config.experts,))
        return super().parameters(config) | {"threshold": threshold}

    def score(
        self, config: Any, mesh: Mesh | None, parameters: Mapping, x_BTD: jax.Array
    ) -> Scores:
        """What each expert answers with, in place of a probability."""
        low_BTEr, length_BTE = self.low_and_length(config, mesh, parameters, x_BTD)
        excess_BTE = length_BTE - parameters["threshold"]
        gate_BTE = jax.nn.relu(excess_BTE)
        active_BT1 = jnp.sum(gate_BTE >= self.theta, axis=-1, keepdims=True)
        return Scores(
            excess_BTE, gate_BTE, gate_BTE * active_BT1 / config.experts_per_token, low_BTEr
        )

    def choose(
        self, config: Any, probabilities_BTE: jax.Array, preference_BTE: jax.Array
    ) -> Routing:
        """All experts whose gate is at least theta: a slot for each, E in those of the others."""
        gate_BTE = probabilities_BTE
        experts = gate_BTE.shape[-1]
        active_BTE = ~(gate_BTE < self.theta)  # true of NaN, which runs no expert in silence
        experts_BTE = jnp.where(active_BTE, jnp.arange(experts, dtype=jnp.int32), experts)
        return Routing(jnp.where(active_BTE, gate_BTE, 0), experts_BTE)

    def most_experts(self, config: Any) -> int:
        return config.experts

    def init_state(self, config: Any) -> RouterState:
        return RouterState({}, {"load_balance": jnp.float32(1)})

    def after_step(self, config: Any, state: RouterState, counts: StepCounts) -> RouterState:
        """More experts a token than K: the balance loss weighs more; fewer: less; K exactly: as
        much.

        Counts are integers: whether a model is at its density is no matter of rounding.
        """
        excess_L = (
            jnp.sum(counts.assignments_LE, axis=-1) - config.experts_per_token * counts.tokens
        )
        scale = state.loss_scales["load_balance"] * (1 + self.controller_rate) ** sign_of_sum(
            excess_L
        )
        return RouterState(state.by_layer, {"load_balance": scale})


def sign_of_sum(numbers_L: jax.Array) -> jax.Array:
    """Of int32 numbers, exactly, whatever their sum: -1, 0 or 1.

    High and low bits are added apart, for the sum over layers of a pod's batch is more than an
    int32 holds.
    """
    low = jnp.sum(numbers_L & (2**LOW_BITS - 1))
    high = jnp.sum(numbers_L >> LOW_BITS) + (low >> LOW_BITS)
    rest = low & (2**LOW_BITS - 1)
    return jnp.where(high == 0, jnp.sign(rest), jnp.sign(high))
