"""Values and gradients at 0, and NaN for NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.numerics import divide, length, masked_mean, nonzero, square_root, unit
from tests.tolerance import assert_close


def test_a_quotient_is_0_where_its_denominator_is_and_so_are_its_gradients():
    a, b = jnp.array([6.0, 6.0, 0.0]), jnp.array([3.0, 0.0, 0.0])
    np.testing.assert_array_equal(divide(a, b), [2, 0, 0])
    of_a, of_b = jax.grad(lambda a, b: jnp.sum(divide(a, b)), argnums=(0, 1))(a, b)
    # 1 / b and - a / b^2
    assert_close(of_a, [1 / 3, 0, 0], terms=4)
    assert_close(of_b, [-2 / 3, 0, 0], terms=4)


def test_a_denominator_of_0_is_1_and_has_gradient_0():
    b = jnp.array([3.0, 0.0, -2.0])
    np.testing.assert_array_equal(nonzero(b), [3, 1, -2])
    np.testing.assert_array_equal(jax.grad(lambda b: jnp.sum(nonzero(b)))(b), [1, 0, 1])
    assert jnp.isnan(nonzero(jnp.nan))


def test_counts_are_divided_as_floats():
    shares = divide(jnp.array([1, 3, 0]), jnp.array([4, 4, 0]))
    assert shares.dtype == jnp.float32
    np.testing.assert_array_equal(shares, [0.25, 0.75, 0])


def test_a_root_has_gradient_0_at_0():
    x = jnp.array([4.0, 0.0])
    np.testing.assert_array_equal(square_root(x), [2, 0])
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(square_root(x)))(x), [0.25, 0])


def test_a_length_is_right_where_squares_are_not():
    x = jnp.float32([[3, 4], [3e-30, 4e-30], [3e30, 4e30], [0, 0]])
    assert_close(length(x)[:1], [5.0], terms=4)
    for row, expected in ((1, 5e-30), (2, 5e30)):
        assert float(length(x)[row]) == pytest.approx(expected, rel=1e-6)
    assert length(x)[3] == 0


def test_a_unit_vector_of_zeros_is_0_and_so_is_its_gradient():
    x = jnp.float32([[3, 4], [3e-30, 4e-30], [0, 0]])
    assert_close(unit(x), [[0.6, 0.8], [0.6, 0.8], [0, 0]], terms=8)
    gradient = jax.grad(lambda x: jnp.sum(unit(x)[:, 0]))(x)
    # d(x / |x|)_0 = (1 - 0.36, -0.48) / |x|
    assert_close(gradient[0], [0.64 / 5, -0.48 / 5], terms=8)
    np.testing.assert_array_equal(gradient[2], [0, 0])


def test_a_mean_of_nothing_is_0_and_so_is_its_gradient():
    values = jnp.array([1.0, 5.0, jnp.nan])
    value_and_grad = jax.value_and_grad(masked_mean)
    some, none = jnp.array([True, True, False]), jnp.zeros(3, bool)
    mean, gradient = value_and_grad(values, some)
    assert mean == 3.0
    np.testing.assert_array_equal(gradient, [0.5, 0.5, 0])
    mean, gradient = value_and_grad(values, none)
    assert mean == 0.0
    np.testing.assert_array_equal(gradient, [0, 0, 0])


def test_what_is_not_a_number_stays_so():
    nan = jnp.float32([jnp.nan, 1])
    assert jnp.isnan(divide(1.0, nan)[0])
    assert jnp.isnan(divide(nan, jnp.ones(2))[0])
    assert jnp.isnan(square_root(nan)[0])
    assert jnp.isnan(unit(nan)).all()
    assert jnp.isnan(length(nan))
