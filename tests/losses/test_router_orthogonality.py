"""Router orthogonality by hand, its gradient, and routers of zeros or of one expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.losses.router_orthogonality import router_orthogonality
from tests.tolerance import assert_close, magnitude

loss, value_and_gradient = (
    jax.jit(router_orthogonality),
    jax.jit(jax.value_and_grad(router_orthogonality)),
)

ROUTER_ED = np.array([[1.0, 0.0], [3.0, 4.0]], np.float32)  # cosine 3/5
ROUTER_LED = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)


def test_value_by_hand():
    # layer 0: two entries of 0.6, so 2 * 0.36 / 2^2 = 0.18
    # layer 1 is orthogonal
    # mean 0.09
    router_LED = np.stack([ROUTER_ED, np.diag([2.0, 7.0])])
    assert loss(router_LED) == pytest.approx(0.09, rel=1e-6)
    # All E = 4 rows are equal: E^2 - E entries are 1.
    assert loss(np.ones((1, 4, 3))) == pytest.approx(12 / 16, rel=1e-6)


def test_gradient_by_hand():
    # c = 0.6 and the loss is c^2 / 2. The mean over two layers halves the gradient.
    # row 0 of length 1: c (b^ - c a^) = 0.6 * (0, 0.8)
    # row 1 of length 5: c (a^ - c b^) / 5 = 0.6 * (0.64, -0.48) / 5
    _, gradient_LED = value_and_gradient(np.stack([ROUTER_ED, np.eye(2, dtype=np.float32)]))
    assert_close(gradient_LED[0], np.array([[0, 0.48], [0.0768, -0.0576]]) / 2, terms=16)
    np.testing.assert_array_equal(gradient_LED[1], np.zeros((2, 2)))


def test_orthonormal_rows_cost_nothing():
    assert loss(np.eye(4, 6)[None]) == 0
    rotated_DD = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0]
    assert loss(np.float32(rotated_DD)[None, :8]) < 1e-13


def test_the_length_of_a_row_changes_nothing():
    length_LE1 = np.float32([[0.1, 1, 3, 1e4, 1e-12]] * 2)[..., None]
    value, gradient_LED = value_and_gradient(ROUTER_LED)
    scaled, gradient_of_scaled_LED = value_and_gradient(ROUTER_LED * length_LE1)
    # Roundings: sums over 7 coordinates and 5 rows, forward and backward, norms and quotients.
    terms = 2 * (7 + 5) + 16
    assert_close(scaled, value, terms)
    assert_close(gradient_of_scaled_LED * length_LE1, gradient_LED, terms)
    along_LE = jnp.sum(gradient_LED * ROUTER_LED, axis=-1)  # at right angles to the row
    assert_close(
        along_LE, np.zeros((2, 5)), terms, largest=magnitude(gradient_LED) * magnitude(ROUTER_LED)
    )


def test_a_zero_row_costs_its_diagonal_and_has_no_gradient():
    # The cosines are [[1, 0.6, 0], [0.6, 1, 0], [0, 0, 0]]: (2 * 0.36 + 1) / 3^2.
    router_LED = np.concatenate([ROUTER_ED, np.zeros((1, 2), np.float32)])[None]
    value, gradient_LED = value_and_gradient(router_LED)
    assert value == pytest.approx(1.72 / 9, rel=1e-6)
    assert np.isfinite(gradient_LED).all()
    np.testing.assert_array_equal(gradient_LED[0, 2], np.zeros(2))
    assert np.linalg.norm(gradient_LED[0, :2]) > 0.05


@pytest.mark.parametrize(
    "router_LED, expected", [(np.zeros((2, 3, 4)), 3 / 9), (np.ones((2, 1, 4)), 0.0)]
)
def test_a_router_of_zeros_and_of_one_expert(router_LED, expected):
    value, gradient_LED = value_and_gradient(np.float32(router_LED))
    assert_close(value, expected, terms=4, largest=1)
    assert_close(gradient_LED, np.zeros(router_LED.shape), terms=4, largest=1)


def test_a_bfloat16_router_is_read_in_float32():
    low_LED = jnp.asarray(ROUTER_LED, jnp.bfloat16)
    assert loss(low_LED) == loss(low_LED.astype(jnp.float32))
