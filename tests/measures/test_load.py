"""Measures of the load of experts, worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_erc.measures.registry import of_load, reading
from tests.tolerance import assert_close


def check(load_LE, **expected):
    found = jax.jit(of_load)(load_LE)
    assert found.keys() == {measure.key for measure in reading("load")}
    for name, expected_L in expected.items():
        value_L = found[f"router/{name}"]
        assert_close(value_L, np.float64(expected_L), terms=16, largest=4)  # of logarithms of E = 4


def test_measures_by_hand():
    # mean share 1/4: even; two experts take everything, log 2 / log 4; one does; shares 1/2, 1/4, 1/8, 1/8 of entropy
    # (1/2 + 2/4 + 3/8 + 3/8) log 2 = 1.75 log 2
    share_LE = np.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0.5, 0.25, 0.125, 0.125]])
    expected = {
        "max_load": [1, 2, 4, 2],
        "min_load": [1, 0, 0, 0.5],
        "load_entropy": [1, 0.5, 0, 0.875],
        "max_violation": [0, 1, 3, 1],
        "dead_experts": [0, 0.5, 0.75, 0],
        # times the mean, in order: 1 1 1 1; 0 0 2 2; 0 0 0 4; 0.5 0.5 1 2
        # The quantile q is at place 3 q of these: 0.15, 1.5, 2.85.
        "load_p5": [1, 0, 0, 0.5],
        "load_p50": [1, 1, 0, 0.75],
        "load_p95": [1, 2, 0.85 * 4, 1 + 0.85],
    }
    check(share_LE, **expected)
    check(np.int32(800 * share_LE), **expected)  # counts


def test_a_layer_without_load_is_even_and_so_is_one_expert():
    check(
        np.array([[0.0, 0.0, 0.0, 0.0], [0, 0, 1, 0]]),
        max_load=[1, 4], load_entropy=[1, 0], max_violation=[0, 3], dead_experts=[0, 0.75],
    )  # fmt: skip
    check(
        np.array([[1.0], [0.0], [5.0]]),
        max_load=[1, 1, 1], load_entropy=[1, 1, 1], max_violation=[0, 0, 0], load_p50=[1, 1, 1],
    )  # fmt: skip


def test_counts_are_divided_once_by_their_total():
    # 3.1 million tokens with 8 of 64 experts each: float32 holds each count, their total is an integer
    counts_LE = jnp.full((1, 64), 3_145_728 * 8 // 64, jnp.int32)
    np.testing.assert_array_equal(of_load(counts_LE)["router/max_load"], [1])
