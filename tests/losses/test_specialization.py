"""Specialization by hand, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.losses.specialization import specialization
from tests.tolerance import assert_close

mean_cosine, mean_cosine_and_gradient = (
    jax.jit(specialization),
    jax.jit(jax.value_and_grad(specialization)),
)

# Token 0 chose three experts, token 1 two, token 2 one.
HIDDEN_BTKF = np.float32(
    [[[[1, 0], [3, 4], [0, 2]], [[1, 1], [-2, -2], [9, 9]], [[5, 5], [6, 6], [7, 7]]]]
)
CHOSEN_BTK = np.array([[[True, True, True], [True, True, False], [False, True, False]]])


def test_specialization_by_hand():
    # token 0: cosines 3/5, 0 and 8/10, each in both orders
    # token 1: -1 in both orders
    # token 2 has no pair
    expected = 2 * (0.6 + 0 + 0.8 - 1) / 8
    # The mean is a sum of cosines of both signs.
    assert_close(mean_cosine(HIDDEN_BTKF, CHOSEN_BTK), expected, terms=16, largest=1)


def test_specialization_gradient_by_hand():
    # a = (1, 0) and b = (3, 4) have c = 0.6. Two pairs have both orders, so the loss is c itself.
    # gradient to a: (b^ - c a^) / |a| = (0, 0.8)
    # gradient to b: (a^ - c b^) / |b| = (0.64, -0.48) / 5
    chosen_BTK = np.array([[[True, True, False]]])
    _, gradient_BTKF = mean_cosine_and_gradient(HIDDEN_BTKF[:, :1], chosen_BTK)
    assert_close(gradient_BTKF[0, 0, :2], [[0, 0.8], [0.128, -0.096]], terms=16)
    np.testing.assert_array_equal(gradient_BTKF[0, 0, 2], np.zeros(2))


def test_lengths_do_not_matter():
    length_BTK1 = np.float32([[[[1e-15], [1e4], [3]], [[7], [1e-3], [1]], [[1], [1], [1]]]])
    found, gradient_BTKF = mean_cosine_and_gradient(HIDDEN_BTKF * length_BTK1, CHOSEN_BTK)
    assert_close(found, specialization(HIDDEN_BTKF, CHOSEN_BTK), terms=16, largest=1)
    assert np.isfinite(gradient_BTKF).all()


def test_the_cosine_with_a_vector_of_zeros_is_zero():
    hidden_BTKF = np.float32([[[[0, 0], [3, 4], [3, 0]]]])  # of three pairs one has a cosine, 0.6
    value, gradient_BTKF = mean_cosine_and_gradient(hidden_BTKF, np.ones((1, 1, 3), bool))
    assert value == pytest.approx(0.6 / 3, rel=1e-6)
    np.testing.assert_array_equal(gradient_BTKF[0, 0, 0], np.zeros(2))
    assert np.isfinite(gradient_BTKF).all() and gradient_BTKF[0, 0, 1].any()


def test_no_pair_is_zero():
    for chosen_BTK in (np.zeros((1, 3, 3), bool), np.eye(3, dtype=bool)[None]):
        value, gradient_BTKF = mean_cosine_and_gradient(HIDDEN_BTKF, chosen_BTK)
        assert value == 0
        np.testing.assert_array_equal(gradient_BTKF, np.zeros(HIDDEN_BTKF.shape))


def test_bfloat16_hidden_is_summed_in_float32():
    low_BTKF = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3, 500)), jnp.bfloat16)
    value, gradient_BTKF = mean_cosine_and_gradient(low_BTKF, np.ones((1, 2, 3), bool))
    assert value.dtype == jnp.float32 and gradient_BTKF.dtype == jnp.bfloat16
    unit_TKF = np.asarray(low_BTKF[0], np.float64)
    unit_TKF /= np.linalg.norm(unit_TKF, axis=-1, keepdims=True)
    cosine_TKK = unit_TKF @ unit_TKF.swapaxes(1, 2)
    # The six cosines of 1 on the diagonals are subtracted. Cosines are sums over 500.
    assert_close(value, (cosine_TKK.sum() - 6) / 12, terms=12, largest=1)
