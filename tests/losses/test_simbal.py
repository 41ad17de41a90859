"""SimBal by hand, its gradient, and what the length of a row does to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.losses.simbal import simbal
from tests.tolerance import assert_close

loss, value_and_gradient = jax.jit(simbal), jax.jit(jax.value_and_grad(simbal))

ROUTER_LED = np.array([[[1.0, 2.0], [-3.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]], np.float32)


def test_value_by_hand():
    # layer 0: R R^T - I = [[5 - 1, -3], [-3, 9 - 1]] with entries 4 + 3 + 3 + 8 = 18
    # layer 1 is the identity
    # mean 9
    assert loss(ROUTER_LED) == pytest.approx(9.0)


def test_gradient_by_hand():
    # d sum |G - I| / dR = 2 S R with the signs S = [[1, -1], [-1, 1]].
    # The rows are 2 (r0 - r1) and 2 (r1 - r0), halved by L.
    _, gradient_LED = value_and_gradient(ROUTER_LED)
    assert_close(gradient_LED[0], [[4.0, 2.0], [-4.0, -2.0]], terms=4)
    # The slope of |x| at 0, its minimum, is taken as 0.
    np.testing.assert_array_equal(gradient_LED[1], np.zeros((2, 2)))


def test_rows_are_not_normalised():
    # Row i has the length a_i and is orthogonal to the others:
    # sum |a_i^2 - 1| = 0 + 3 + 0.75 over one layer.
    assert loss(np.diag(np.float32([1.0, 2.0, 0.5]))[None]) == pytest.approx(3.75)


def test_a_router_of_zeros_costs_e_and_stays():
    value, gradient_LED = value_and_gradient(np.zeros((2, 3, 4), np.float32))
    assert value == 3
    np.testing.assert_array_equal(gradient_LED, np.zeros((2, 3, 4)))


def test_a_bfloat16_router_is_read_in_float32():
    low_LED = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 7)), jnp.bfloat16)
    # Operations run one by one, since a compiler may skip a rounding.
    assert simbal(low_LED) == simbal(low_LED.astype(jnp.float32))
