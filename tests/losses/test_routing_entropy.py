"""Routing entropy by hand, and its slope where a probability is 0."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.losses.routing_entropy import routing_entropy
from tests.tolerance import assert_close

loss, value_and_gradient = jax.jit(routing_entropy), jax.jit(jax.value_and_grad(routing_entropy))

P_BTE = np.float32([[[0.5, 0.5, 0.0], [0.25, 0.25, 0.5], [1 / 3, 1 / 3, 1 / 3]]])
MASK_BT = np.array([[True, True, False]])


def test_value_by_hand():
    # token 0: log 2
    # token 1: 2 * 0.25 log 4 + 0.5 log 2 = 1.5 log 2
    # token 2 is masked
    assert loss(P_BTE, MASK_BT) == pytest.approx(1.25 * math.log(2), rel=1e-6)
    assert loss(P_BTE[:, 2:], np.array([[True]])) == pytest.approx(math.log(3), rel=1e-6)
    assert loss(np.float32([[[0, 1, 0]]]), np.array([[True]])) == 0


def test_gradient_by_hand():
    _, gradient_BTE = value_and_gradient(P_BTE, MASK_BT)
    # -(log p + 1) / 2 tokens
    assert_close(gradient_BTE[0, 1], -(np.log([0.25, 0.25, 0.5]) + 1) / 2, terms=8, largest=1)
    np.testing.assert_array_equal(gradient_BTE[0, 2], np.zeros(3))
    assert 0 < gradient_BTE[0, 0, 2] < 100  # at p = 0, where the slope has no bound


def test_scores_that_leave_no_probability_give_finite_gradients():
    # The probabilities are 1, 0, 0; even; and with a denormal number.
    scores_BTE = np.float32([[[300, 0, -300], [0, 0, 0], [0, 0, -95]]])
    entropy = lambda scores_BTE: routing_entropy(jax.nn.softmax(scores_BTE), np.ones((1, 3), bool))  # noqa: E731
    gradient_BTE = jax.jit(jax.grad(entropy))(scores_BTE)
    assert np.isfinite(gradient_BTE).all()
    # The entropy is level at all three.
    assert_close(gradient_BTE, np.zeros((1, 3, 3)), terms=8, largest=1)


def test_a_masked_batch_costs_nothing():
    value, gradient_BTE = value_and_gradient(P_BTE, np.zeros((1, 3), bool))
    assert value == 0
    np.testing.assert_array_equal(gradient_BTE, np.zeros(P_BTE.shape))


def test_bfloat16_is_read_in_float32():
    low_BTE = jnp.asarray(P_BTE, jnp.bfloat16)
    # Operations run one by one, since a compiler may skip a rounding.
    assert routing_entropy(low_BTE, MASK_BT) == routing_entropy(
        low_BTE.astype(jnp.float32), MASK_BT
    )
