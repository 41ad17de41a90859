"""Routing by hand: who is chosen, with what weight, and the means that the losses read."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.moe.routing import Routing, statistics, top_k

# softmax(ln p) = p, so these are the probabilities themselves
SCORES_BTE = jnp.log(jnp.array([[[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]]))
MASK_BT = jnp.array([[True, True]])


def test_top_k_takes_the_most_probable_and_keeps_their_probabilities():
    routing = top_k(SCORES_BTE, 2, renormalize=False)
    np.testing.assert_array_equal(routing.experts_BTK, [[[0, 1], [2, 1]]])
    np.testing.assert_allclose(routing.weights_BTK, [[[0.5, 0.3], [0.7, 0.2]]], rtol=1e-6)


def test_renormalized_weights_sum_to_one():
    routing = top_k(SCORES_BTE, 2, renormalize=True)
    np.testing.assert_allclose(routing.weights_BTK, [[[0.5 / 0.8, 0.3 / 0.8], [0.7 / 0.9, 0.2 / 0.9]]], rtol=1e-6)


def test_ties_go_to_the_lower_expert():
    np.testing.assert_array_equal(top_k(jnp.zeros((1, 1, 4)), 2, renormalize=False).experts_BTK, [[[0, 1]]])


def test_statistics_by_hand():
    stats = statistics(SCORES_BTE, top_k(SCORES_BTE, 2, renormalize=False), MASK_BT)
    np.testing.assert_allclose(stats.load_E, [1 / 4, 2 / 4, 1 / 4])  # assignments 0 1 2 1
    np.testing.assert_allclose(stats.probability_E, [0.3, 0.25, 0.45], rtol=1e-6)
    assert stats.logsumexp2 == pytest.approx(0.0, abs=1e-10)  # ln(0.5 + 0.3 + 0.2) = 0


def test_statistics_do_not_count_masked_tokens():
    stats = statistics(SCORES_BTE + 2.0, top_k(SCORES_BTE, 2, renormalize=False), jnp.array([[True, False]]))
    np.testing.assert_allclose(stats.load_E, [1 / 2, 1 / 2, 0])
    np.testing.assert_allclose(stats.probability_E, [0.5, 0.3, 0.2], rtol=1e-6)
    assert stats.logsumexp2 == pytest.approx(4.0, rel=1e-6)  # (2 + ln 1)^2
    nothing = statistics(SCORES_BTE, Routing(*top_k(SCORES_BTE, 2, False)), jnp.zeros((1, 2), bool))
    assert not nothing.load_E.any()
