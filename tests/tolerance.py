"""Equality of floating-point arrays: they differ by no more than rounding does on any processor.

A rounded sum of n numbers depends on their order. The order depends on a processor's vector width,
its fused multiply-adds, the number of threads and the version of a compiler. Each addition rounds
by at most half a unit in the last place (`eps`, 2^-23 for float32) of the partial sum. Two orders
therefore differ by at most n eps times the sum of the magnitudes.

An element near 0 is a sum whose terms cancel. Its error is as large as that of its neighbours, so
a tolerance relative to each element would fail there without any fault. The size of the terms is
therefore taken from the largest element:

    |actual - expected| <= terms * eps * max |expected|

terms is the length of the longest chain of roundings that leads to an element. A matmul over D has
D terms, and successive matmuls add theirs. A quotient, root, exponential or logarithm counts four,
since libraries compute it to a few units. Cases by hand, of two or three numbers, have 4 to 16.

`pytest.approx` allows 1e-6 of the number itself, which is eight units of float32. It suits numbers
by hand, which are sums of few terms.
"""

import jax
import numpy as np

FAULT = 1e-3  # A test has to see a formula that is wrong by this share of the largest element.


def assert_close(actual, expected, terms, largest=None, label=""):
    """Asserts that two arrays, or all leaves of two trees, are equal but for rounding.

    Integers and booleans must be equal exactly.

    Args:
      actual, expected: trees of one structure; leaves are arrays, numbers, or lists of numbers. A
        unit in the last place is one of the dtype with the fewer bits.
      terms: length of the longest chain of roundings that leads to an element.
      largest: magnitude of what was rounded, where the elements are small differences of it. The
        default is that of the largest finite element of each expected leaf.
      label: what is compared, for the message.

    Raises:
      AssertionError: with the elements that differ.
      ValueError: for so many terms that a fault of 1e-3 in float32 could not be seen.
    """
    assert _structure(actual) == _structure(expected), label
    pairs = zip(_leaves(actual), _leaves(expected), strict=True)
    for (path, found), (_, right) in pairs:
        _assert_leaf(found, right, terms, largest, label + jax.tree_util.keystr(path))


def _is_list(node):
    """Whether a leaf is a list of numbers, which is one array."""
    return isinstance(node, list)


def _structure(tree):
    return jax.tree.structure(tree, is_leaf=_is_list)


def _leaves(tree):
    return jax.tree.leaves_with_path(tree, is_leaf=_is_list)


def _assert_leaf(actual, expected, terms, largest, label):
    actual, expected = _as_array(actual), _as_array(expected)
    eps = max(_eps(actual.dtype), _eps(expected.dtype))
    if eps == 0:
        np.testing.assert_array_equal(actual, expected, err_msg=label)
        return
    if eps == 2.0**-23 and terms * eps > FAULT:
        raise ValueError(
            f"{terms} terms in float32 allow {terms * eps:.0e}: "
            f"a fault of {FAULT:.0e} would not be seen"
        )
    actual, expected = np.float64(actual), np.float64(expected)
    size = magnitude(expected) if largest is None else largest
    np.testing.assert_allclose(actual, expected, rtol=0, atol=terms * eps * size, err_msg=label)


def assert_decided(scores, count=1, terms=1000):
    """Asserts that rounding cannot change which `count` scores are highest along the last axis."""
    scores = np.asarray(scores)
    ordered = -np.sort(-np.float64(scores), axis=-1)
    gaps = -np.diff(ordered, axis=-1)[..., :count]
    needed = terms * _eps(scores.dtype) * magnitude(scores)
    assert (gaps > needed).all(), (
        f"a gap of {gaps.min():.1e}, where rounding may move scores by {needed:.1e}"
    )


def within(terms, dtype=np.float32):
    """Half the width of an interval about a sum of magnitude 1: `terms` units in the last place."""
    return terms * _eps(np.dtype(dtype))


def magnitude(array):
    """The magnitude of the largest finite element, 0 if there is none."""
    sizes = np.abs(np.float64(array))
    return float(np.max(sizes[np.isfinite(sizes)], initial=0.0))


def _as_array(value):
    return (
        value if isinstance(value, np.ndarray | np.generic) else np.asarray(jax.device_get(value))
    )


def _eps(dtype):
    """The eps of a floating-point dtype, including bfloat16 and its like; 0 of any other dtype."""
    return (
        float(jax.numpy.finfo(dtype).eps)
        if jax.numpy.issubdtype(dtype, jax.numpy.floating)
        else 0.0
    )


def assert_same_change(start, actual, expected, terms, steps=1, label=""):
    """Asserts that steps change `start` equally, which is more than equal results.

    The tolerance is that of the terms of all steps together, and one rounding of the sum per step.
    Parameters are large and steps are small, so a comparison of the parameters themselves would
    hide a wrong gradient.
    """
    assert (
        jax.tree.structure(start) == jax.tree.structure(actual) == jax.tree.structure(expected)
    ), label
    leaves = jax.tree.leaves_with_path(start), jax.tree.leaves(actual), jax.tree.leaves(expected)
    for (path, before), found, right in zip(*leaves, strict=True):
        before, found, right = (np.float64(_as_array(leaf)) for leaf in (before, found, right))
        size = magnitude(right - before) + magnitude(before) * steps / terms
        _assert_leaf(
            np.float32(found - before),
            right - before,
            terms,
            size,
            label + jax.tree_util.keystr(path),
        )
