"""Load-balancing loss by hand, and the one route its gradient takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.losses.load_balance import load_balance

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
    np.testing.assert_allclose(to_probability, 4 * LOAD_LE / 2)  # E * load / L
