"""Routing variance by hand, and the inputs that its gradient reaches."""

import jax
import numpy as np
import pytest

from moe_erc.losses.routing_variance import released_variance, routing_variance
from tests.tolerance import assert_close

variance = jax.jit(routing_variance)
variance_and_gradient = jax.jit(jax.value_and_grad(routing_variance))

PROBABILITY_BTE = np.float32([[[0.6, 0.2, 0.2], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]]])
EXPERTS_BTK = np.array([[[0, 1], [2, 1], [1, 0]]])
MASK_BT = np.array([[True, True, False]])


def test_variance_by_hand():
    # The scores are (0.75, 0.25, 0) and (0, 0.25, 0.75), their mean is (0.375, 0.25, 0.375). Each
    # deviates by 0.375 in two coordinates: 4 * 0.140625 over N E = 2 * 3.
    # The third token is masked.
    assert variance(PROBABILITY_BTE, EXPERTS_BTK, MASK_BT) == pytest.approx(
        -4 * 0.140625 / 6, rel=1e-6
    )


def test_an_empty_slot_is_left_out():
    # The scores are (1, 0, 0) and (0, 0.25, 0.75), their mean is (0.5, 0.125, 0.375). Each has
    # 0.25 + 0.015625 + 0.140625.
    experts_BTK = np.array([[[0, 3], [2, 1], [1, 0]]])
    assert variance(PROBABILITY_BTE, experts_BTK, MASK_BT) == pytest.approx(
        -2 * 0.40625 / 6, rel=1e-6
    )


def test_variance_reaches_the_chosen_of_unmasked_tokens_alone():
    _, gradient_BTE = variance_and_gradient(PROBABILITY_BTE, EXPERTS_BTK, MASK_BT)
    assert not gradient_BTE[0, 0, 2] and not gradient_BTE[0, 1, 0]
    np.testing.assert_array_equal(gradient_BTE[0, 2], np.zeros(3))
    # Token 0: dL/ds = -2 (s - mean) / 6 = (-0.125, 0, 0.125). The chosen p = (0.6, 0.2) have the
    # sum 0.8 and get (dL/ds_e - <s, dL/ds>) / 0.8 = (-0.125 + 0.09375, 0.09375) / 0.8.
    assert_close(gradient_BTE[0, 0], [-0.0390625, 0.1171875, 0], terms=8)


def test_a_small_variance_keeps_its_digits():
    # The scores are 0.5 +- 2^-14. The squares 2^-28 are less than half a unit in the last place of
    # the mean square, 0.25.
    probability_BTE = 0.5 + np.float32([[[2**-14, -(2**-14)], [-(2**-14), 2**-14]]])
    found = variance(probability_BTE, np.array([[[0, 1], [0, 1]]]), np.ones((1, 2), bool))
    # The rounding of a score of 0.5 is half of 2^-24, which is 2^-11 of its deviation 2^-14. The
    # square has twice that error.
    assert found == pytest.approx(-(2.0**-28), rel=2.0**-9)


@pytest.mark.parametrize("case", ["alike", "all masked", "all empty", "probability 0"])
def test_nothing_to_tell_apart_is_zero_and_finite(case):
    probability_BTE, experts_BTK, mask_BT = (
        np.full((1, 3, 3), 1 / 3, np.float32),
        np.zeros((1, 3, 1), int),
        MASK_BT,
    )
    if case == "all masked":
        # A compiler may make 0 of False / 0, but not of 0.0 / 0.
        probability_BTE, experts_BTK, mask_BT = (
            PROBABILITY_BTE,
            EXPERTS_BTK,
            np.zeros((1, 3), np.float32),
        )
    elif case == "all empty":
        experts_BTK = np.full((1, 3, 2), 3)
    elif case == "probability 0":
        probability_BTE = np.zeros((1, 3, 3), np.float32)
    value, gradient_BTE = variance_and_gradient(probability_BTE, experts_BTK, mask_BT)
    assert value == 0
    # A mean over three tokens may leave a rounding of 1 / 3.
    assert_close(gradient_BTE, np.zeros((1, 3, 3)), terms=4, largest=1)


def test_released_variance_is_over_the_experts_of_a_token():
    # (0.6, 0.2, 0.2) and (0.2, 0.2, 0.6) deviate from 1/3 by 4/15, -2/15, -2/15: the sum of squares
    # is 24/225, over E - 1 = 2. The third token is masked.
    found = released_variance(PROBABILITY_BTE, MASK_BT)
    assert found == pytest.approx(-12 / 225, rel=1e-5)
