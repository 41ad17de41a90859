"""Routing-free MoE (arXiv 2604.00801): every expert decides by itself whether it runs on a token.

    g_e = relu(|x @ w_low[e]| - threshold[e]),   active where g_e >= theta,   y = sum_active g_e expert_e(x)

How many experts a token meets is not fixed: the weight of the balance loss is raised while more than K of them do, and
lowered while fewer (`training/router_state.py`). That loss reads g times the token's number of experts over K, a
constant: where many run they are pushed most, or one layer's experts would run for all. With load_e the share of all
assignments that expert e has, it is E sum_e load_e mean_n(g_e n_experts / K). Thresholds begin at the length to be
expected of a normalised token. The paper's two losses, L_EB + L_TB with lambda_0 1e-10, are not offered. The gate of an
expert is factorised as in AoE, and w_low is its first factor.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_erc.moe.routers import aoe
from moe_erc.moe.routing import Router, Routing, Scores


def declare(config):
    """The first factors, and thresholds at the length to be expected of a normalised token: half of them run."""
    expected = config.init_std * (config.width * config.gate_rank) ** 0.5
    return aoe.declare(config) | {"threshold": (nn.initializers.constant(expected), (config.experts,))}


def score(config, mesh, parameters, x_BTD):
    """What each expert answers with, in place of a probability."""
    low_BTEr, length_BTE = aoe.low_and_length(config, mesh, parameters, x_BTD)
    excess_BTE = length_BTE - parameters["threshold"]
    gate_BTE = jax.nn.relu(excess_BTE)
    active_BT1 = jnp.sum(gate_BTE >= config.theta, axis=-1, keepdims=True)
    return Scores(excess_BTE, gate_BTE, gate_BTE * active_BT1 / config.experts_per_token, low_BTEr)


def choose(gate_BTE, _, config):
    """All experts whose gate is at least theta: a slot for each, E in those of the others."""
    experts = gate_BTE.shape[-1]
    active_BTE = ~(gate_BTE < config.theta)  # true of NaN, which runs no expert in silence
    experts_BTE = jnp.where(active_BTE, jnp.arange(experts, dtype=jnp.int32), experts)
    return Routing(jnp.where(active_BTE, gate_BTE, 0), experts_BTE)


ROUTER = Router(declare, score, aoe.work, rows=None, choose=choose)
