"""Experts that decide for themselves: gates, threshold, theta, and a token that nobody takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.losses.load_balance import load
from moe_erc.moe.layer import MoE
from moe_erc.moe.routing import StepCounts
from tests.tolerance import assert_close

# (1, 2) becomes (3, 4), (0, 0) and (0.6, 0.8), of lengths 5, 0 and 1.
W_LOW_EDR = jnp.array(
    [[[3.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]], [[0.6, 0.0], [0.0, 0.4]]]
)
X_BTD = jnp.array([[[1.0, 2.0]]])


@pytest.fixture
def config(model_config):
    def make(theta):
        sizes = {
            "width": 2,
            "heads": 1,
            "experts": 3,
            "experts_per_token": 1,
            "expert_width": 2,
            "rank": 2,
        }
        return model_config(router="routing_free", theta=theta, **sizes)

    return make


def test_gates_by_hand(config):
    parameters = {"w_low": W_LOW_EDR, "threshold": jnp.array([3.0, 1.0, 0.75])}
    scores = config(0.05).router.score(config(0.05), None, parameters, X_BTD)
    # 5 - 3, 0 - 1, 1 - 0.75. The gate of an expert below its threshold is 0.
    assert_close(scores.logits_BTE, [[[2, -1, 0.25]]], terms=8)
    assert_close(scores.probabilities_BTE, [[[2, 0, 0.25]]], terms=8)
    # Two experts run and K is 1: 2 * 2 / 1, 0, 0.25 * 2 / 1. With theta above 0.25 one expert runs.
    assert_close(scores.balance_BTE, [[[4, 0, 0.5]]], terms=8)
    fewer = config(0.3).router.score(config(0.3), None, parameters, X_BTD)
    assert_close(fewer.balance_BTE, [[[2, 0, 0.25]]], terms=8)
    assert_close(scores.low_BTEr, [[[[3, 4], [0, 0], [0.6, 0.8]]]], terms=8)


@pytest.mark.parametrize(
    "theta, active", [(0.2, [0, 3, 2]), (0.25, [0, 3, 2]), (0.3, [0, 3, 3]), (3.0, [3, 3, 3])]
)
def test_experts_whose_gate_reaches_theta_answer_with_it(config, theta, active):
    gate_BTE = jnp.array([[[2.0, 0.0, 0.25]]])
    routing = config(theta).router.choose(config(theta), gate_BTE, gate_BTE)
    np.testing.assert_array_equal(routing.experts_BTK, [[active]])
    np.testing.assert_array_equal(
        routing.weights_BTK, [[np.where(np.array(active) < 3, [2.0, 0.0, 0.25], 0)]]
    )


def test_a_token_that_nobody_takes_gets_nothing_and_passes_finite_gradients(config):
    config = config(0.05)
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"w_high": (3, 2, 2), "w_up": (3, 2, 2), "w_down": (3, 2, 2)}
    params = {
        name: jax.random.normal(key, of)
        for key, (name, of) in zip(keys, shapes.items(), strict=True)
    }
    params |= {"w_low": W_LOW_EDR, "threshold": jnp.array([3.0, 1.0, 0.75])}
    # The second token has the lengths 0.5, 0 and 0.1.
    x_BTD = jnp.array([[[1.0, 2.0], [0.1, 0.2], [0.0, 0.0]]])

    def loss(params, x_BTD):
        y_BTD, stats, _ = MoE(config).apply({"params": params}, x_BTD, jnp.ones((1, 3), bool), {})
        return jnp.sum(jnp.sin(y_BTD + 1)), (y_BTD, stats)

    (_, (y_BTD, stats)), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        params, x_BTD
    )
    assert not y_BTD[0, 1:].any()
    # The experts of the first token: their low-rank vectors and their gates.
    low = {0: ([3, 4], 2), 2: ([0.6, 0.8], 0.25)}

    def expert(number):
        hidden_F = jax.nn.silu(jnp.array(low[number][0]) @ params["w_high"][number]) * (
            x_BTD[0, 0] @ params["w_up"][number]
        )
        return low[number][1] * hidden_F @ params["w_down"][number]

    assert_close(y_BTD[0, 0], expert(0) + expert(2), terms=16)
    # The first token has two experts, the others have none.
    assert StepCounts(*stats[:2]).experts_per_token_L == pytest.approx(2 / 3)
    assert_close(load(stats.assignments_E), [1 / 2, 0, 1 / 2], terms=4)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert (
        gradients[0]["threshold"][0]
        and gradients[0]["w_low"][0].any()
        and not gradients[1][0, 1:].any()
    )


def test_thresholds_begin_at_the_length_of_a_normalised_token(model_config):
    config = model_config(router="routing_free", rank=8, init_std=0.02)
    threshold = config.router.parameters(config)["threshold"]
    # 32 coordinates of 1 through weights of 0.02 give 8 coordinates of variance 32 * 0.02^2, so a
    # length of 0.02 sqrt(256).
    assert_close(threshold.initializer(None, threshold.shape), np.full(4, 0.02 * 16), terms=8)
