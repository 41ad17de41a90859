"""Sigmoid gates against numpy in float64, and what their bias does and does not turn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.moe.routers.sigmoid import Sigmoid
from tests.tolerance import assert_close

E = 6
D = 8
K = 2


@pytest.fixture
def config(model_config):
    return model_config(router="sigmoid", width=D, experts=E, experts_per_token=K)


@pytest.fixture
def tokens():
    rng = np.random.default_rng(0)
    return np.float32(rng.normal(size=(2, 5, D))), np.float32(rng.normal(size=(E, D)))


def route(router, config, tokens, state):
    x_BTD, router_ED = tokens
    scores = router.score(config, None, {"router": jnp.asarray(router_ED)}, jnp.asarray(x_BTD))
    preference_BTE = router.preference(scores, state)
    return scores, router.choose(config, scores.probabilities_BTE, preference_BTE)


def test_choice_and_weights_are_those_of_the_formula(config, tokens):
    bias_E = np.linspace(-0.3, 0.3, E)
    router = Sigmoid(scale=2.5, bias_rate=1e-3)
    scores, routing = route(router, config, tokens, {"bias": jnp.float32(bias_E)})
    x_BTD, router_ED = np.float64(tokens[0]), np.float64(tokens[1])
    logits_BTE = x_BTD @ router_ED.T
    sigmoid_BTE = 1 / (1 + np.exp(-logits_BTE))
    experts_BTK = np.argsort(-(sigmoid_BTE + bias_E), axis=-1)[..., :K]
    np.testing.assert_array_equal(routing.experts_BTK, experts_BTK)
    chosen_BTK = np.take_along_axis(sigmoid_BTE, experts_BTK, axis=-1)
    weights_BTK = 2.5 * chosen_BTK / chosen_BTK.sum(axis=-1, keepdims=True)
    assert_close(routing.weights_BTK, weights_BTK, terms=4 * D)
    assert_close(scores.logits_BTE, logits_BTE, terms=D)
    shares_BTE = sigmoid_BTE / sigmoid_BTE.sum(axis=-1, keepdims=True)
    assert_close(scores.probabilities_BTE, shares_BTE, terms=4 * D)


def test_without_renormalize_weights_are_shares_of_all_experts(config, tokens):
    scores, routing = route(Sigmoid(renormalize=False), config, tokens, {})
    largest_BTK = np.sort(scores.probabilities_BTE, axis=-1)[..., ::-1][..., :K]
    np.testing.assert_array_equal(routing.weights_BTK, largest_BTK)


def test_a_bias_turns_the_choice_and_not_the_weights(config, tokens):
    # A bias of 2 is above every sigmoid: expert 4 is always chosen, with its own small weight.
    bias_E = jnp.zeros(E).at[4].set(2.0)
    scores, routing = route(Sigmoid(), config, tokens, {"bias": bias_E})
    np.testing.assert_array_equal(routing.experts_BTK[..., 0], 4)
    sigmoid_BTE = jax.nn.sigmoid(scores.logits_BTE)
    chosen_BTK = np.take_along_axis(np.asarray(sigmoid_BTE), routing.experts_BTK, axis=-1)
    weights_BTK = chosen_BTK / chosen_BTK.sum(axis=-1, keepdims=True)
    assert_close(routing.weights_BTK, weights_BTK, terms=8)


def test_far_logits_leave_weights_and_gradients_finite(config):
    x_BTD = jnp.full((1, 1, D), 10.0)
    for sign in (-1.0, 1.0):

        def total(router_ED):
            scores = Sigmoid().score(config, None, {"router": router_ED}, x_BTD)
            chosen = Sigmoid().choose(config, scores.probabilities_BTE, scores.probabilities_BTE)
            return jnp.sum(chosen.weights_BTK**2)

        value, gradient = jax.value_and_grad(total)(jnp.full((E, D), sign))
        assert np.isfinite(value) and np.all(np.isfinite(gradient))
