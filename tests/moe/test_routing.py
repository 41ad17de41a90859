"""Routing by hand: who is chosen, with what weight, and the means that the losses read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.losses.load_balance import load
from moe_erc.moe.routing import Routing, RoutingStats, Scores, StepCounts, even, statistics
from tests.tolerance import assert_close, within

PROBABILITIES_BTE = jnp.array([[[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]])
MASK_BT = jnp.array([[True, True]])


@pytest.fixture
def choose(model_config):
    def run(probabilities_BTE=PROBABILITIES_BTE, bias_E=0.0, **changes):
        experts = probabilities_BTE.shape[-1]
        config = model_config(**{"experts": experts, "experts_per_token": 2} | changes)
        return config.router.choose(config, probabilities_BTE, probabilities_BTE + bias_E)

    return run


def scores(logits_BTE):
    return Scores(logits_BTE, PROBABILITIES_BTE, PROBABILITIES_BTE)


def test_the_most_probable_are_taken_with_their_probabilities(choose):
    routing = choose()
    np.testing.assert_array_equal(routing.experts_BTK, [[[0, 1], [2, 1]]])
    assert_close(routing.weights_BTK, [[[0.5, 0.3], [0.7, 0.2]]], terms=8)


def test_renormalized_weights_sum_to_one(choose):
    routing = choose(renormalize=True)
    assert_close(routing.weights_BTK, [[[0.5 / 0.8, 0.3 / 0.8], [0.7 / 0.9, 0.2 / 0.9]]], terms=8)


def test_ties_go_to_the_lower_expert(choose):
    np.testing.assert_array_equal(choose(jnp.full((1, 1, 4), 0.25)).experts_BTK, [[[0, 1]]])


def test_a_bias_turns_the_choice_and_not_the_weight(choose):
    routing = choose(bias_E=jnp.array([0.0, -0.2, 0.5]))
    # The preferences are 0.5, 0.1, 0.7 and 0.1, 0.0, 1.2.
    np.testing.assert_array_equal(routing.experts_BTK, [[[2, 0], [2, 0]]])
    assert_close(routing.weights_BTK, [[[0.2, 0.5], [0.7, 0.1]]], terms=8)


def test_the_gradient_of_the_chosen_does_not_know_the_bias(choose):
    def loss(probabilities_BTE, bias_E):
        return jnp.sum(jnp.array([3.0, 5.0]) * choose(probabilities_BTE, bias_E).weights_BTK)

    to_probabilities, to_bias = jax.grad(loss, (0, 1))(
        PROBABILITIES_BTE, jnp.array([0.0, -0.2, 0.5])
    )
    # Expert 2 comes first, then 0.
    np.testing.assert_array_equal(to_probabilities, [[[5, 0, 3], [5, 0, 3]]])
    assert not to_bias.any()


def test_top_p_keeps_the_smallest_prefix_whose_sum_exceeds_it(choose):
    # Alone, 0.5 and 0.7 exceed 0.49.
    # To exceed 0.51, the first token needs 0.5 + 0.3, and the second still only 0.7.
    # To exceed 0.81, they need 0.5 + 0.3 + 0.2 and 0.7 + 0.2.
    for top_p, experts, weights in (
        (0.49, [[0, 3, 3], [2, 3, 3]], [[0.5, 0, 0], [0.7, 0, 0]]),
        (0.51, [[0, 1, 3], [2, 3, 3]], [[0.5, 0.3, 0], [0.7, 0, 0]]),
        (0.81, [[0, 1, 2], [2, 1, 3]], [[0.5, 0.3, 0.2], [0.7, 0.2, 0]]),
        (1.0, [[0, 1, 2], [2, 1, 0]], [[0.5, 0.3, 0.2], [0.7, 0.2, 0.1]]),
    ):
        routing = choose(top_p=top_p, experts_per_token=3)
        np.testing.assert_array_equal(routing.experts_BTK, [experts])
        assert_close(routing.weights_BTK, [weights], terms=8)


def test_top_p_keeps_no_more_than_k_and_a_sum_that_equals_it_does_not_exceed_it(choose):
    routing = choose(jnp.array([[[0.25, 0.5, 0.25]]]), top_p=0.5, experts_per_token=3)
    np.testing.assert_array_equal(routing.experts_BTK, [[[1, 0, 3]]])
    assert (choose(jnp.full((1, 1, 4), 0.25), top_p=0.9).experts_BTK < 4).sum() == 2


def test_renormalized_top_p_weights_sum_to_one_over_the_prefix(choose):
    routing = choose(top_p=0.51, renormalize=True)
    assert_close(routing.weights_BTK, [[[0.5 / 0.8, 0.3 / 0.8], [1, 0]]], terms=8)


def test_statistics_by_hand(choose):
    stats = statistics(scores(jnp.log(PROBABILITIES_BTE)), choose(), MASK_BT)
    assert_close(load(stats.assignments_E), [1 / 4, 2 / 4, 1 / 4], terms=4)  # assignments 0 1 2 1
    assert_close(stats.probability_E, [0.3, 0.25, 0.45], terms=8)
    assert StepCounts(*stats[:2]).experts_per_token_L == 2
    assert stats.logsumexp2 == pytest.approx(0.0, abs=within(8) ** 2)  # ln(0.5 + 0.3 + 0.2) = 0


def test_statistics_do_not_count_masked_tokens(choose):
    stats = statistics(
        scores(jnp.log(PROBABILITIES_BTE) + 2.0), choose(), jnp.array([[True, False]])
    )
    assert_close(load(stats.assignments_E), [1 / 2, 1 / 2, 0], terms=4)
    assert_close(stats.probability_E, [0.5, 0.3, 0.2], terms=8)
    assert StepCounts(*stats[:2]).experts_per_token_L == 2
    assert stats.logsumexp2 == pytest.approx(4.0, rel=1e-6)  # (2 + ln 1)^2
    nothing = statistics(scores(PROBABILITIES_BTE), choose(), jnp.zeros((1, 2), bool))
    assert not load(nothing.assignments_E).any()
    assert StepCounts(*nothing[:2]).experts_per_token_L == 0


def test_statistics_do_not_count_empty_slots():
    routing = Routing(jnp.array([[[0.5, 0.3], [0.7, 0.0]]]), jnp.array([[[0, 1], [2, 3]]]))
    stats = statistics(scores(jnp.log(PROBABILITIES_BTE)), routing, MASK_BT)
    assert_close(load(stats.assignments_E), [1 / 3, 1 / 3, 1 / 3], terms=4)
    assert StepCounts(*stats[:2]).experts_per_token_L == 1.5  # three experts of two tokens


def test_balance_reads_what_the_router_says_it_should():
    balance_BTE = PROBABILITIES_BTE[..., ::-1]
    of = Scores(jnp.log(PROBABILITIES_BTE), PROBABILITIES_BTE, balance_BTE)
    stats = statistics(of, Routing(jnp.ones((1, 2, 1)), jnp.zeros((1, 2, 1), jnp.int32)), MASK_BT)
    assert_close(stats.probability_E, [0.45, 0.25, 0.3], terms=8)


def test_loads_are_integers_that_no_number_of_tokens_rounds():
    # 3.1 million tokens have one expert each, and all but three have the first. float32 shares of
    # 1 / N, added one by one, would lose 0.3 %.
    tokens = 3_145_728
    experts_BTK = jnp.zeros((1, tokens, 1), jnp.int32).at[0, 5:8].set(1)
    even_BTE = jnp.full((1, tokens, 2), 0.5)
    of, mask_BT = (
        Scores(jnp.zeros_like(even_BTE), even_BTE, even_BTE),
        jnp.ones((1, tokens), bool).at[0, 0].set(False),
    )
    stats = jax.jit(statistics)(of, Routing(jnp.ones(experts_BTK.shape), experts_BTK), mask_BT)
    assert stats.assignments_E.dtype == stats.tokens.dtype == jnp.int32
    np.testing.assert_array_equal(stats.assignments_E, [tokens - 4, 3])
    assert stats.tokens == tokens - 1


def test_loads_have_the_axes_of_the_counts():
    stats = RoutingStats(jnp.array([[3, 1], [0, 0]]), jnp.array([2, 2]), None, None)
    np.testing.assert_array_equal(load(stats.assignments_E), [[0.75, 0.25], [0, 0]])
    np.testing.assert_array_equal(StepCounts(*stats[:2]).experts_per_token_L, [2, 0])


def test_forced_balance_meets_all_experts_equally_and_weighs_by_probability():
    probabilities_BTE = jax.random.uniform(jax.random.key(0), (2, 6, 4))
    found = even(probabilities_BTE, 2)
    np.testing.assert_array_equal(
        found.experts_BTK[0], [[0, 1], [2, 3], [0, 1], [2, 3], [0, 1], [2, 3]]
    )
    np.testing.assert_array_equal(np.bincount(np.ravel(found.experts_BTK)), [6, 6, 6, 6])
    np.testing.assert_array_equal(found.weights_BTK[0, 1], probabilities_BTE[0, 1, 2:])
