"""Routing at the edges: order, sums and ties of any probabilities, and no NaN is routed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_erc.moe.layer import declare
from moe_erc.moe.routers import ROUTERS, competition
from moe_erc.numerics import unit
from tests.tolerance import assert_close, within

T, E, K, D = 2, 6, 3, 8
repeatable = settings(deadline=None, max_examples=30, derandomize=True)
# There are few levels, so that ties are common. Some logits are so far apart that probabilities are
# exactly 0.
logit = st.sampled_from([0.0, 1.0, 1.5, -200.0, 1e30]) | st.floats(-9, 9, width=32)
logits = st.lists(logit, min_size=T * E, max_size=T * E).map(
    lambda numbers: np.float32(numbers).reshape(1, T, E)
)
biases = st.lists(st.sampled_from([0.0, 0.5, -0.5, 100.0]), min_size=E, max_size=E).map(np.float32)


@pytest.fixture(scope="module")
def choose(model_config):
    """Routes logits: the routing, the probabilities, and the gradient of a sum of the weights.

    Each config is compiled once.
    """
    compiled = {}

    def make(**changes):
        config = model_config(**{"experts": E, "experts_per_token": K} | changes)

        def run(logits_BTE, bias_E):
            probabilities_BTE = jax.nn.softmax(logits_BTE, axis=-1)
            routing = config.router.choose(config, probabilities_BTE, probabilities_BTE + bias_E)
            return jnp.sum(routing.weights_BTK * jnp.arange(1, K + 1)), (routing, probabilities_BTE)

        return compiled.setdefault(str(changes), jax.jit(jax.value_and_grad(run, has_aux=True)))

    return make


@repeatable
@given(logits, biases)
def test_experts_come_by_preference_and_ties_by_number(choose, logits_BTE, bias_E):
    (_, (routing, probabilities_BTE)), gradient = choose()(logits_BTE, bias_E)
    preference_BTE = np.asarray(probabilities_BTE) + bias_E
    expected_BTE = np.argsort(-preference_BTE, axis=-1, kind="stable")
    np.testing.assert_array_equal(routing.experts_BTK, expected_BTE[..., :K])
    np.testing.assert_array_equal(
        routing.weights_BTK,
        np.take_along_axis(np.asarray(probabilities_BTE), expected_BTE[..., :K], axis=-1),
    )
    assert (np.sum(routing.weights_BTK, axis=-1) <= 1 + within(E)).all()
    assert np.isfinite(gradient).all()


@repeatable
@given(logits, biases)
def test_renormalized_weights_sum_to_one_or_are_all_zero(choose, logits_BTE, bias_E):
    (_, (routing, probabilities_BTE)), gradient = choose(renormalize=True)(logits_BTE, bias_E)
    chosen_BTK = np.take_along_axis(
        np.asarray(probabilities_BTE), np.asarray(routing.experts_BTK), axis=-1
    )
    assert_close(np.sum(routing.weights_BTK, axis=-1), chosen_BTK.any(axis=-1), terms=8)
    assert np.isfinite(gradient).all()


def test_chosen_probabilities_that_almost_vanish_are_weighed_as_others_are(choose):
    # e^-80 : e^-81 : e^-82 is 1 : e^-1 : e^-2, whatever the others have. The gradient follows it.
    bias_E = np.float32([0, 0, 0, 100, 100, 100])
    outcomes = [
        choose(renormalize=True)(np.float32([[[0, 0, 0, -80, -81, -82]] * T]), bias_E),
        choose(renormalize=True)(np.float32([[[0, 0, 0, 2, 1, 0]] * T]), bias_E),
    ]
    (_, (routing, _)), gradient = outcomes[0]
    powers = np.exp([0.0, -1.0, -2.0])
    # The rounding of an exponent of 82 is half a unit of 64. The power has that relative error, 32
    # units of 1. The other exponents have less.
    assert_close(routing.weights_BTK, [[powers / powers.sum()] * T], terms=2 * 64)
    assert np.abs(gradient).max() > 0.1
    assert_close(gradient, outcomes[1][1], terms=4 * 64)


@repeatable
@given(logits, st.sampled_from([0.1, 0.5, 0.9]))
def test_top_p_keeps_the_shortest_prefix_that_exceeds_it(choose, logits_BTE, top_p):
    (_, (routing, _)), gradient = choose(top_p=top_p)(logits_BTE, np.zeros(E, np.float32))
    for weights_K, experts_K in zip(routing.weights_BTK[0], routing.experts_BTK[0], strict=True):
        kept = int(np.sum(experts_K < E))
        assert kept >= 1 and (experts_K[kept:] == E).all() and not weights_K[kept:].any()
        assert np.sum(weights_K[: kept - 1]) <= top_p + within(2 * K)
        assert kept == K or np.sum(weights_K[:kept]) > top_p - within(2 * K)
    assert np.isfinite(gradient).all()


@repeatable
@given(st.integers(0, 99), st.integers(-44, 37))
def test_a_unit_vector_has_a_gradient_at_any_length(seed, exponent):
    x_TD = np.random.default_rng(seed).normal(size=(T, D)).astype(np.float32)
    direction_TD, gradient_TD = unit_and_gradient(x_TD)
    with np.errstate(under="ignore"):
        scale = np.float32(10.0**exponent)
        found_TD, found_gradient_TD = unit_and_gradient(x_TD * scale)
    assert np.isfinite(found_TD).all()
    assert np.isfinite(found_gradient_TD).all() or exponent < -35
    # At other exponents the vector or its gradient is so small that float32 has few bits or none.
    if -35 <= exponent <= 30:
        # Roundings: a norm over D, a quotient, and a scale that is not a power of two.
        assert_close(found_TD, direction_TD, terms=D + 8)
        # The direction ignores the scale, so its gradient goes with 1 / scale.
        found = np.float32(np.float64(found_gradient_TD) * scale)
        # The gradient is a difference of two terms that are longer.
        assert_close(found, gradient_TD, terms=4 * (D + 8))


@jax.jit
def unit_and_gradient(x_TD):
    return unit(x_TD), jax.grad(lambda x_TD: jnp.sum(unit(x_TD) * jnp.arange(D)))(x_TD)


# ------------------------------------------------------------ NaN
@pytest.mark.parametrize(
    "top_p, renormalize", [(1.0, False), (1.0, True), (0.5, False), (0.5, True)]
)
def test_nan_is_not_routed_to_a_valid_weight(choose, top_p, renormalize):
    logits_BTE = np.zeros((1, T, E), np.float32)
    logits_BTE[0, 1, 2] = np.nan
    (_, (routing, _)), _ = choose(top_p=top_p, renormalize=renormalize)(
        logits_BTE, np.zeros(E, np.float32)
    )
    assert np.isfinite(routing.weights_BTK[0, 0]).all()
    assert np.isnan(routing.weights_BTK[0, 1, 0])


RANKS = {"aoe": {"rank": D}, "routing_free": {"rank": D}}


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_a_nan_in_tokens_or_parameters_shows_in_the_weights(model_config, name):
    config = model_config(
        router=name, experts=E, experts_per_token=E, width=D, expert_width=4, **RANKS.get(name, {})
    )
    router, rng = config.router, np.random.default_rng(0)
    declared = {name: parameter.shape for name, parameter in declare(config).items()}
    parameters = {
        parameter: rng.normal(size=shape).astype(np.float32)
        for parameter, shape in declared.items()
    }
    x_BTD = rng.normal(size=(1, T, D)).astype(np.float32)

    @jax.jit
    def weights(parameters, x_BTD):
        probabilities_BTE = router.score(config, None, parameters, x_BTD).probabilities_BTE
        return router.choose(config, probabilities_BTE, probabilities_BTE).weights_BTK

    assert np.isfinite(weights(parameters, x_BTD)).all()
    token = x_BTD.copy()
    token[0, 1, 3] = np.nan
    found_BTK = weights(parameters, token)
    assert np.isfinite(found_BTK[0, 0]).all() and np.isnan(found_BTK[0, 1]).any()
    for parameter in router.parameters(config):
        spoilt = np.array(parameters[parameter])
        spoilt.flat[-1] = np.nan
        assert np.isnan(weights(parameters | {parameter: spoilt}, x_BTD)).any(axis=-1).all(), (
            parameter
        )


def test_a_competition_that_nobody_enters_weighs_nobody():
    # Very negative answers have a softplus of 0.
    routing, share_BTE = competition.winners(jnp.zeros((1, T, E)), K)
    assert not routing.weights_BTK.any() and np.isfinite(share_BTE).all()
