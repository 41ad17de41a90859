"""The tolerance of the other tests lets sums in any order pass, and no wrong formula."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.tolerance import assert_close, assert_decided, assert_same_change

N = 256


@pytest.fixture
def products():
    """(64, N) float32, whose sums along N are about 16 or, by chance, near 0."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(64, N)) * rng.normal(size=(64, N))).astype(np.float32)


def differs(*arguments, **options):
    with pytest.raises(AssertionError):
        assert_close(*arguments, **options)


def test_a_sum_in_another_order_is_the_same_and_one_of_a_thousandth_more_is_not(products):
    one_after_the_other = np.cumsum(products, axis=1)[:, -1]
    expected = np.sum(np.float64(products), axis=1)
    assert (one_after_the_other != np.sum(products, axis=1)).any()  # by pairs
    assert_close(one_after_the_other, expected, terms=N)
    differs(np.float32(1.001 * expected), expected, terms=N)


def test_the_largest_element_decides_and_not_each():
    assert_close(np.float32([1.0, 2.0**-23]), [1, 0], terms=1)
    differs(np.float32([1.0, 2.0**-21]), [1, 0], terms=1)
    differs(np.float32([2.0**-23]), [0], terms=1)
    assert_close(np.float32([2.0**-23]), [0], terms=1, largest=1)


def test_the_dtype_of_fewest_bits_decides():
    assert_close(jnp.bfloat16(1 + 2.0**-7), 1.0, terms=1)
    differs(jnp.bfloat16(1 + 2.0**-6), 1.0, terms=1)
    differs(np.float64(1 + 2.0**-23), 1.0, terms=8)


def test_of_trees_every_leaf_has_its_own_size_and_whole_numbers_none():
    expected = {"large": np.float32([1e6]), "small": (np.float32([1e-6]), np.int32([7]))}
    assert_close(expected, expected, terms=1)
    differs(expected | {"small": (np.float32([1.001e-6]), np.int32([7]))}, expected, terms=100)
    differs(expected | {"small": (np.float32([1e-6]), np.int32([8]))}, expected, terms=100)
    differs({"large": np.float32([1e6])}, expected, terms=100)


@pytest.mark.parametrize(
    "found, expected", [(np.nan, 1.0), (1.0, np.nan), (np.inf, 1.0), (-np.inf, np.inf)]
)
def test_what_is_not_finite_is_like_itself_alone(found, expected):
    assert_close(np.float32([1, expected]), [1, expected], terms=1)
    differs(np.float32([1, found]), [1, expected], terms=1000)


def test_terms_that_would_hide_a_fault_are_refused():
    with pytest.raises(ValueError, match="10000 terms in float32 allow 1e-03"):
        assert_close(np.float32(1), 1.0, terms=10_000)


def test_a_change_is_known_to_its_own_size():
    start, step = np.float32([1.0, 2.0]), np.float32([1e-2, -2e-2])
    assert_same_change(start, start + step, np.float64(start) + step, terms=100)
    # A comparison of the parameters themselves would hide the fault.
    assert_close(start + 1.001 * step, start + step, terms=400)
    with pytest.raises(AssertionError):
        assert_same_change(
            start, start + np.float32(1.001) * step, np.float64(start) + step, terms=100
        )


def test_a_tie_is_not_decided():
    assert_decided(np.float32([[3, 1, 2], [0, 5, 1]]))
    assert_decided(np.float32([3, 2, 1, 1]), count=2)
    for tied in (np.float32([1, 3, 3]), np.float32([3, 3 + 2.0**-20, 1])):
        with pytest.raises(AssertionError):
            assert_decided(tied)
    with pytest.raises(AssertionError):
        assert_decided(np.float32([3, 1, 1]), count=2)
