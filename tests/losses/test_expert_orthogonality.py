"""Output overlap and routing variance by hand, against float64 loops, and the routes of their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.losses.expert_orthogonality import output_overlap, routing_variance
from tests.tolerance import assert_close, magnitude

overlap, overlap_and_gradient = jax.jit(output_overlap), jax.jit(jax.value_and_grad(output_overlap))
variance, variance_and_gradient = jax.jit(routing_variance), jax.jit(jax.value_and_grad(routing_variance))

# token 0 chose three, token 1 two, token 2 one
OUTPUT_BTKD = np.float32([[[[2, 0], [3, 4], [0, 1]], [[1, 1], [1, 0], [9, 9]], [[5, 5], [6, 6], [7, 7]]]])
CHOSEN_BTK = np.array([[[True, True, True], [True, True, False], [False, True, False]]])


def reference_overlap(output_BTKD, chosen_BTK, eps=1e-8):
    """The definition, pair by pair, in float64."""
    squares = []
    for output_KD, chosen_K in zip(
        np.float64(output_BTKD).reshape(-1, *output_BTKD.shape[2:]),
        chosen_BTK.reshape(-1, chosen_BTK.shape[-1]),
        strict=True,
    ):
        for j, k in np.ndindex(len(chosen_K), len(chosen_K)):
            if j != k and chosen_K[j] and chosen_K[k]:
                projection_D = output_KD[j] @ output_KD[k] / (output_KD[k] @ output_KD[k] + eps) * output_KD[k]
                squares.append(projection_D @ projection_D)
    return np.mean(squares)


def random_outputs(seed=0, B=2, T=3, K=4, D=5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, T, K, D)).astype(np.float32), rng.random((B, T, K)) < 0.7


# ---------------------------------------------------------------------------------------------------- output overlap
def test_overlap_by_hand():
    # o_j on o_k is <o_j, o_k>^2 / |o_k|^2. Token 0, o = (2, 0), (3, 4), (0, 1): <0, 1> = 6, <0, 2> = 0, <1, 2> = 4,
    # squared lengths 4, 25, 1: 36/25 + 36/4 + 0 + 0 + 16/1 + 16/25 = 27.08
    # token 1, (1, 1) and (1, 0): 1/1 + 1/2;  token 2 has no pair;  8 pairs
    assert overlap(OUTPUT_BTKD, CHOSEN_BTK) == pytest.approx((27.08 + 1.5) / 8, rel=1e-6)


def test_overlap_matches_the_definition():
    output_BTKD, chosen_BTK = random_outputs()
    found = overlap(output_BTKD, chosen_BTK)
    assert_close(found, reference_overlap(output_BTKD, chosen_BTK), terms=2 * 3 * 4 * 4 + 5)  # pairs, of 5 coordinates
    found = overlap(output_BTKD, chosen_BTK, eps=0.5)
    assert_close(found, reference_overlap(output_BTKD, chosen_BTK, eps=0.5), terms=2 * 3 * 4 * 4 + 5)


def test_overlap_trains_the_chosen_alone():
    output_BTKD, chosen_BTK = random_outputs()
    _, gradient_BTKD = overlap_and_gradient(output_BTKD, chosen_BTK)
    np.testing.assert_array_equal(gradient_BTKD[~chosen_BTK], np.zeros((np.sum(~chosen_BTK), 5)))
    step = 1e-5
    for index in [(0, 0, 0, 1), (1, 2, 0, 4), (*np.argwhere(chosen_BTK)[-1], 2)]:
        change = np.zeros(output_BTKD.shape)
        change[index] = step
        ahead, behind = (reference_overlap(output_BTKD + sign * change, chosen_BTK) for sign in (1, -1))
        # sums over 4 partners and 5 coordinates, to the size of the largest; the differences are of float64
        slope = (ahead - behind) / (2 * step)
        assert_close(gradient_BTKD[index], slope, terms=4 * 5, largest=magnitude(gradient_BTKD))


def test_overlap_of_outputs_at_right_angles_and_of_no_pair_is_zero():
    assert overlap(np.eye(3, 4, dtype=np.float32)[None, None], np.ones((1, 1, 3), bool)) == 0
    for chosen_BTK in (np.zeros((1, 3, 3), bool), np.eye(3, dtype=bool)[None]):
        value, gradient_BTKD = overlap_and_gradient(OUTPUT_BTKD, chosen_BTK)
        assert value == 0
        np.testing.assert_array_equal(gradient_BTKD, np.zeros(OUTPUT_BTKD.shape))


def test_overlap_with_an_output_of_zeros_is_zero():
    output_BTKD = np.float32([[[[0, 0], [3, 4]]]])
    value, gradient_BTKD = overlap_and_gradient(output_BTKD, np.ones((1, 1, 2), bool))
    assert value == 0
    np.testing.assert_array_equal(gradient_BTKD, np.zeros((1, 1, 2, 2)))


def test_bfloat16_outputs_are_summed_in_float32():
    output_BTKD, chosen_BTK = random_outputs(D=300)
    low_BTKD = jnp.asarray(output_BTKD, jnp.bfloat16)
    value, gradient_BTKD = overlap_and_gradient(low_BTKD, chosen_BTK)
    assert value.dtype == jnp.float32 and gradient_BTKD.dtype == jnp.bfloat16
    expected = reference_overlap(np.asarray(low_BTKD, np.float32), chosen_BTK)
    assert_close(value, expected, terms=300 + 2 * 3 * 4 * 4)  # a sum in bfloat16 would be off by 1e-2


def test_nothing_has_k_times_k_times_d_numbers_a_token():
    output = jax.ShapeDtypeStruct((4, 16, 8, 256), jnp.float32)
    chosen = jax.ShapeDtypeStruct((4, 16, 8), bool)
    program = jax.jit(jax.value_and_grad(output_overlap)).lower(output, chosen).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * output.size * 4  # such an array is 8 outputs large


# ---------------------------------------------------------------------------------------------------- routing variance
PROBABILITY_BTE = np.float32([[[0.6, 0.2, 0.2], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]]])
EXPERTS_BTK = np.array([[[0, 1], [2, 1], [1, 0]]])
MASK_BT = np.array([[True, True, False]])


def test_variance_by_hand():
    # scores (0.75, 0.25, 0) and (0, 0.25, 0.75), mean (0.375, 0.25, 0.375): each is 0.375 from it in two coordinates,
    # 4 * 0.140625 over N E = 2 * 3; the third token is masked
    assert variance(PROBABILITY_BTE, EXPERTS_BTK, MASK_BT) == pytest.approx(-4 * 0.140625 / 6, rel=1e-6)


def test_an_empty_slot_is_left_out():
    # scores (1, 0, 0) and (0, 0.25, 0.75), mean (0.5, 0.125, 0.375): 0.25 + 0.015625 + 0.140625 each
    experts_BTK = np.array([[[0, 3], [2, 1], [1, 0]]])
    assert variance(PROBABILITY_BTE, experts_BTK, MASK_BT) == pytest.approx(-2 * 0.40625 / 6, rel=1e-6)


def test_variance_reaches_the_chosen_of_unmasked_tokens_alone():
    _, gradient_BTE = variance_and_gradient(PROBABILITY_BTE, EXPERTS_BTK, MASK_BT)
    assert not gradient_BTE[0, 0, 2] and not gradient_BTE[0, 1, 0]
    np.testing.assert_array_equal(gradient_BTE[0, 2], np.zeros(3))
    # Token 0: dL/ds = -2 (s - mean) / 6 = (-0.125, 0, 0.125), of which the chosen p = (0.6, 0.2) of sum 0.8 get
    # (dL/ds_e - <s, dL/ds>) / 0.8 = (-0.125 + 0.09375, 0.09375) / 0.8
    assert_close(gradient_BTE[0, 0], [-0.0390625, 0.1171875, 0], terms=8)


def test_a_small_variance_keeps_its_digits():
    # scores 0.5 +- 2^-14: the squares 2^-28 are less than half a unit in the last place of the mean square, 0.25
    probability_BTE = 0.5 + np.float32([[[2**-14, -(2**-14)], [-(2**-14), 2**-14]]])
    found = variance(probability_BTE, np.array([[[0, 1], [0, 1]]]), np.ones((1, 2), bool))
    # A score of 0.5 is known to half of 2^-24, 2^-11 of its deviation 2^-14; squared, to twice as much.
    assert found == pytest.approx(-(2.0**-28), rel=2.0**-9)


@pytest.mark.parametrize("case", ["alike", "all masked", "all empty", "probability 0"])
def test_nothing_to_tell_apart_is_zero_and_finite(case):
    probability_BTE, experts_BTK, mask_BT = np.full((1, 3, 3), 1 / 3, np.float32), np.zeros((1, 3, 1), int), MASK_BT
    if case == "all masked":
        # A compiler may make 0 of False / 0, but not of 0.0 / 0.
        probability_BTE, experts_BTK, mask_BT = PROBABILITY_BTE, EXPERTS_BTK, np.zeros((1, 3), np.float32)
    elif case == "all empty":
        experts_BTK = np.full((1, 3, 2), 3)
    elif case == "probability 0":
        probability_BTE = np.zeros((1, 3, 3), np.float32)
    value, gradient_BTE = variance_and_gradient(probability_BTE, experts_BTK, mask_BT)
    assert value == 0
    # A rounding of 1 / 3 is left where a mean over three tokens is not multiplied out in one go.
    assert_close(gradient_BTE, np.zeros((1, 3, 3)), terms=4, largest=1)
