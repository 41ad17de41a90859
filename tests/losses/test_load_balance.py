"""Load-balancing loss by hand, and the one route its gradient takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.losses.load_balance import load, load_balance
from tests.tolerance import assert_close

# two layers, four experts: balanced; and half of the load on experts 0 and 1 each, probabilities likewise
LOAD_LE = jnp.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]])


def test_value_by_hand():
    # layer 0: 4 * 4 * 0.0625 = 1;  layer 1: 4 * (0.25 + 0.25) = 2 = E / K for K = 2;  mean 1.5
    assert load_balance(LOAD_LE, LOAD_LE) == pytest.approx(1.5)
    # layer 1 with uniform probabilities: 4 * (0.5 + 0.5) * 0.25 = 1
    assert load_balance(LOAD_LE[1:], LOAD_LE[:1]) == pytest.approx(1.0)


def test_gradient_flows_through_probability_alone():
    to_load, to_probability = jax.grad(load_balance, argnums=(0, 1))(LOAD_LE, LOAD_LE)
    assert not to_load.any()
    assert_close(to_probability, 4 * LOAD_LE / 2, terms=4)  # E * load / L


def test_a_load_is_divided_once_by_the_number_of_assignments():
    np.testing.assert_array_equal(load(jnp.array([[3, 1, 0, 4], [0, 0, 0, 0]])), [[3 / 8, 1 / 8, 0, 1 / 2], [0] * 4])
    # 3.1 million tokens with 8 of 64 experts each: float32 holds each count, their total is an integer
    counts_LE = jnp.full((1, 64), 3_145_728 * 8 // 64, jnp.int32)
    np.testing.assert_array_equal(load(counts_LE), np.full((1, 64), 1 / 64))
