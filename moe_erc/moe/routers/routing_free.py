"""Routing-free MoE (arXiv 2604.00801): every expert decides by itself whether it runs on a token.

    g_e = relu(|x @ w_low[e]| - threshold[e]),   active where g_e >= theta
    y = sum_active g_e expert_e(x)

The number of experts per token is not fixed. A controller raises the weight of the balance loss
while tokens meet more than K experts on average, and lowers it while they meet fewer.

    balance = E sum_e load_e mean_n(g_e n_experts / K),   load_e the share of all assignments

n_experts, the number of experts that run on the token, is a constant to the gradient. It pushes
most where many experts run; without it, the experts of one layer would run on every token.

The gate of an expert is factorised as in AoE, and w_low is its first factor. Thresholds begin at
the expected length for a normalised token. The paper's two losses, L_EB + L_TB with lambda_0 1e-10,
are not offered.
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

# Numbers whose sum an int32 may not hold are added in two parts; the lower has so many bits.
LOW_BITS = 15


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingFree(Factorized):
    """Gates in place of probabilities.

    The state is the controller's: {"load_balance": scalar}, the factor of that loss's weight.
    """

    name: ClassVar[str] = "routing_free"
    # The least gate with which an expert runs.
    theta: float = within(above=0, default=0.05)
    # By how much a step may change the weight of the balance loss, as a share of it.
    controller_rate: float = within(least=0, default=0.02)

    def parameters(self, config: Any) -> dict[str, Parameter]:
        """The first factors, and the thresholds.

        A threshold begins at the expected length for a normalised token: half of the experts run.
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
        balance_BTE = gate_BTE * active_BT1 / config.experts_per_token
        return Scores(excess_BTE, gate_BTE, balance_BTE, low_BTEr)

    def choose(
        self, config: Any, probabilities_BTE: jax.Array, preference_BTE: jax.Array
    ) -> Routing:
        """All experts whose gate is at least theta. Every expert has a slot; idle ones hold E."""
        gate_BTE = probabilities_BTE
        experts = gate_BTE.shape[-1]
        # `~(… < …)` rather than `>=`: it is true of NaN, which then shows in the output.
        active_BTE = ~(gate_BTE < self.theta)
        experts_BTE = jnp.where(active_BTE, jnp.arange(experts, dtype=jnp.int32), experts)
        return Routing(jnp.where(active_BTE, gate_BTE, 0), experts_BTE)

    def most_experts(self, config: Any) -> int:
        return config.experts

    def init_state(self, config: Any) -> RouterState:
        return RouterState({}, {"load_balance": jnp.float32(1)})

    def after_step(self, config: Any, state: RouterState, counts: StepCounts) -> RouterState:
        """The balance loss weighs more after a step with more than K experts per token, else less.

        With exactly K it keeps its weight. Counts are integers, so rounding has no part in this.
        """
        assignments_L = jnp.sum(counts.assignments_LE, axis=-1)
        excess_L = assignments_L - config.experts_per_token * counts.tokens
        factor = (1 + self.controller_rate) ** sign_of_sum(excess_L)
        scale = state.loss_scales["load_balance"] * factor
        return RouterState(state.by_layer, {"load_balance": scale})


def sign_of_sum(numbers_L: jax.Array) -> jax.Array:
    """The sign of a sum of int32 numbers: -1, 0 or 1, exactly, however large the sum is.

    High and low bits are added apart, because an int32 does not hold the sum over the layers for a
    pod's batch.
    """
    low = jnp.sum(numbers_L & (2**LOW_BITS - 1))
    high = jnp.sum(numbers_L >> LOW_BITS) + (low >> LOW_BITS)
    rest = low & (2**LOW_BITS - 1)
    return jnp.where(high == 0, jnp.sign(rest), jnp.sign(high))
