"""Cosines of vectors in the plane, worked by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.measures.output_cosine import pairwise_cosine
from tests.tolerance import assert_close, within

EVERY = jnp.ones((1, 1), bool)


def unit_sum(*vectors):
    """(1, 1, D): of one token, for experts that answer in these directions."""
    return sum(np.array(vector) / np.linalg.norm(vector) for vector in vectors)[None, None].astype(np.float32)


@pytest.mark.parametrize("vectors, cosine", [
    ([(1, 0), (2, 0), (5, 0)], 1),  # |(3, 0)|^2 = 9; (9 - 3) / 6
    ([(1, 0), (0, 2)], 0),  # |(1, 1)|^2 = 2; (2 - 2) / 2
    ([(1, 0), (-3, 0)], -1),  # |0|^2 = 0; (0 - 2) / 2
    ([(1, 0), (1, 0), (0, 1)], 1 / 3),  # pairs 1, 0, 0; |(2, 1)|^2 = 5; (5 - 3) / 6
    ([(1, 0), (3, 4)], 3 / 5),  # |(1.6, 0.8)|^2 = 3.2; (3.2 - 2) / 2
    ([(7, 0)], 0),  # no pairs
])  # fmt: skip
def test_cosines_by_hand(vectors, cosine):
    found = pairwise_cosine(unit_sum(*vectors), len(vectors), EVERY)
    assert found.dtype == jnp.float32 and found.shape == ()
    assert_close(found, cosine, terms=8, largest=1)  # cosines that cancel


def test_a_mean_over_unmasked_tokens():
    # Two experts; tokens of cosine 1, 0 and, masked, nothing finite: (1 + 0) / 2.
    sums_BTD = jnp.concatenate([unit_sum((1, 0), (1, 0)), unit_sum((1, 0), (0, 1)), jnp.full((1, 1, 2), jnp.nan)], 1)
    assert pairwise_cosine(sums_BTD, 2, jnp.array([[True, True, False]])) == pytest.approx(0.5)
    assert pairwise_cosine(sums_BTD, 2, jnp.zeros((1, 3), bool)) == 0


def test_sums_in_half_precision_are_squared_in_float32():
    # 256 experts that agree, as bfloat16: |256|^2 + 1 needs 17 bits, bfloat16 has 8; (65,537 - 256) / (256 * 255)
    sums_BTD = jnp.array([[[256.0, 1.0]]], jnp.bfloat16)
    assert pairwise_cosine(sums_BTD, 256, EVERY) == pytest.approx(65281 / 65280, rel=within(1))
