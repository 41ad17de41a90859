"""Output overlap by hand and against float64 loops, and the inputs that its gradient reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.losses.output_overlap import output_overlap, released_overlap
from tests.tolerance import assert_close, magnitude

overlap, overlap_and_gradient = jax.jit(output_overlap), jax.jit(jax.value_and_grad(output_overlap))

# Token 0 chose three experts, token 1 two, token 2 one.
OUTPUT_BTKD = np.float32(
    [[[[2, 0], [3, 4], [0, 1]], [[1, 1], [1, 0], [9, 9]], [[5, 5], [6, 6], [7, 7]]]]
)
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
                projection_D = (
                    output_KD[j] @ output_KD[k] / (output_KD[k] @ output_KD[k] + eps) * output_KD[k]
                )
                squares.append(projection_D @ projection_D)
    return np.mean(squares)


def random_outputs(seed=0, B=2, T=3, K=4, D=5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, T, K, D)).astype(np.float32), rng.random((B, T, K)) < 0.7


def test_overlap_by_hand():
    # o_j on o_k is <o_j, o_k>^2 / |o_k|^2; there are 8 pairs
    # token 0: o = (2, 0), (3, 4), (0, 1), so <0, 1> = 6, <0, 2> = 0, <1, 2> = 4
    #          squared lengths 4, 25, 1: 36/25 + 36/4 + 0 + 0 + 16/1 + 16/25 = 27.08
    # token 1: (1, 1) and (1, 0), so 1/1 + 1/2
    # token 2 has no pair
    assert overlap(OUTPUT_BTKD, CHOSEN_BTK) == pytest.approx((27.08 + 1.5) / 8, rel=1e-6)


def test_overlap_matches_the_definition():
    output_BTKD, chosen_BTK = random_outputs()
    found = overlap(output_BTKD, chosen_BTK)
    # Roundings: sums over pairs, of 5 coordinates.
    assert_close(found, reference_overlap(output_BTKD, chosen_BTK), terms=2 * 3 * 4 * 4 + 5)
    found = overlap(output_BTKD, chosen_BTK, eps=0.5)
    assert_close(
        found, reference_overlap(output_BTKD, chosen_BTK, eps=0.5), terms=2 * 3 * 4 * 4 + 5
    )


def test_overlap_trains_the_chosen_alone():
    output_BTKD, chosen_BTK = random_outputs()
    _, gradient_BTKD = overlap_and_gradient(output_BTKD, chosen_BTK)
    np.testing.assert_array_equal(gradient_BTKD[~chosen_BTK], np.zeros((np.sum(~chosen_BTK), 5)))
    step = 1e-5
    for index in [(0, 0, 0, 1), (1, 2, 0, 4), (*np.argwhere(chosen_BTK)[-1], 2)]:
        change = np.zeros(output_BTKD.shape)
        change[index] = step
        ahead, behind = (
            reference_overlap(output_BTKD + sign * change, chosen_BTK) for sign in (1, -1)
        )
        # Gradients sum over 4 partners and 5 coordinates, relative to the largest. The differences
        # are exact to float64.
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
    # A sum in bfloat16 would have an error of 1e-2.
    assert_close(value, expected, terms=300 + 2 * 3 * 4 * 4)


def test_nothing_has_k_times_k_times_d_numbers_a_token():
    output = jax.ShapeDtypeStruct((4, 16, 8, 256), jnp.float32)
    chosen = jax.ShapeDtypeStruct((4, 16, 8), bool)
    program = jax.jit(jax.value_and_grad(output_overlap)).lower(output, chosen).compile()
    # An array of all pairs would be as large as 8 outputs.
    assert program.memory_analysis().temp_size_in_bytes < 4 * output.size * 4


def reference_released(output_BTKD, experts_BTK, chosen_BTK):
    """The released reading in float64: sorted by expert, cut into groups, least squares."""
    size, width = output_BTKD.shape[2:]
    flat_SD = np.float64(output_BTKD).reshape(-1, width)
    kept_S = [s for s in range(len(flat_SD)) if chosen_BTK.reshape(-1)[s]]
    kept_S.sort(key=lambda s: experts_BTK.reshape(-1)[s])
    squares = []
    for first in range(0, len(kept_S) - size + 1, size):
        group_KD = flat_SD[kept_S[first : first + size]]
        for k in range(size):
            others_DJ = np.delete(group_KD, k, axis=0).T
            shares_J = np.linalg.lstsq(others_DJ, group_KD[k], rcond=None)[0]
            squares.append(np.sum((others_DJ @ shares_J) ** 2))
    return np.mean(squares)


def test_released_overlap_matches_its_definition():
    for K in (2, 3):
        output_BTKD, chosen_BTK = random_outputs(K=K, T=7, D=9)
        experts_BTK = np.random.default_rng(1).integers(0, 4, chosen_BTK.shape)
        found = jax.jit(released_overlap)(output_BTKD, experts_BTK, chosen_BTK)
        # Products of 9 coordinates, of which K bases subtract each other; a group of random
        # directions in 9 dimensions is well conditioned.
        expected = reference_released(output_BTKD, experts_BTK, chosen_BTK)
        assert_close(found, expected, terms=9 * K * K + 2 * 7 * K)


def test_released_overlap_compares_the_tokens_of_one_expert():
    # Both tokens chose experts 0 and 1. Each expert gives both tokens the same, so the released
    # loss is the mean of |o|^2; the experts of one token are orthogonal, so L_o is 0.
    output_BTKD = np.float32([[[[2, 0], [0, 1]], [[2, 0], [0, 1]]]])
    chosen_BTK = np.ones((1, 2, 2), bool)
    experts_BTK = np.array([[[0, 1], [0, 1]]])
    assert overlap(output_BTKD, chosen_BTK) == 0
    assert released_overlap(output_BTKD, experts_BTK, chosen_BTK) == pytest.approx(2.5, rel=1e-6)


def test_released_overlap_of_nothing_and_of_zeros_is_0_with_finite_gradients():
    experts_BTK = np.zeros((1, 2, 2), int)
    gradient_of = jax.jit(jax.value_and_grad(released_overlap))
    for output, chosen in ((0.0, True), (1.0, False)):
        output_BTKD = np.full((1, 2, 2, 3), output, np.float32)
        value, gradient = gradient_of(output_BTKD, experts_BTK, np.full((1, 2, 2), chosen))
        assert value == 0
        np.testing.assert_array_equal(gradient, np.zeros_like(output_BTKD))
