"""The layer as a whole: experts beside the routed ones, competition, observations, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.losses import LOSSES
from moe_erc.losses.base import NoOptions
from moe_erc.losses.load_balance import load
from moe_erc.losses.output_overlap import output_overlap
from moe_erc.moe.layer import MoE, declare
from moe_erc.moe.routers import competition
from moe_erc.moe.routing import StepCounts
from tests import tolerance

B, T, D, F, E, K = 2, 5, 8, 6, 4, 2
EXPERTS = ("w_gate", "w_up", "w_down")


@pytest.fixture(scope="module")
def tiny(model_config):
    def make(**changes):
        sizes = {"width": D, "expert_width": F, "experts": E, "experts_per_token": K}
        return model_config(**sizes | changes)

    return make


def parameters(config):
    declared, rng = declare(config), np.random.default_rng(0)
    return {
        name: jnp.asarray(0.7 * rng.normal(size=of.shape), jnp.float32)
        for name, of in declared.items()
    }


def tokens():
    return jnp.asarray(np.random.default_rng(1).normal(size=(B, T, D)), jnp.float32)


MASK_BT = jnp.ones((B, T), bool).at[1, 3:].set(False)


def apply(config, params, router_state, observe=None):
    """(y, statistics, observation) of a layer that keeps everything."""
    observers = (("it", observe, ("output", "hidden")),) if observe else ()
    run = jax.jit(MoE(config, observers=observers).apply)
    y_BTD, stats, observed = run({"params": params}, tokens(), MASK_BT, router_state)
    return y_BTD, stats, observed.get("it")


def all_experts(params):
    """(hidden (B, T, E, F), output (B, T, E, D)) of every expert on every token."""
    gate_BTEF, up_BTEF = (
        jnp.einsum("btd,edf->btef", tokens(), params[name]) for name in ("w_gate", "w_up")
    )
    hidden_BTEF = jax.nn.silu(gate_BTEF) * up_BTEF
    return hidden_BTEF, jnp.einsum("btef,efd->bted", hidden_BTEF, params["w_down"])


def mixture(params, weights_BTK, experts_BTK):
    output_BTKD = jnp.take_along_axis(all_experts(params)[1], experts_BTK[..., None], axis=2)
    return jnp.sum(weights_BTK[..., None] * output_BTKD, axis=2)


def assert_close(found, expected):
    # Roundings: sums over D, F and E, and scores, activations and cosines.
    tolerance.assert_close(found, expected, terms=2 * D + F + E + 16)


def test_the_most_probable_experts_are_mixed(tiny):
    params = parameters(tiny())
    y_BTD, stats, _ = apply(tiny(), params, {})
    assert_close(
        y_BTD, mixture(params, *jax.lax.top_k(jax.nn.softmax(tokens() @ params["router"].T), K))
    )
    assert StepCounts(*stats[:2]).experts_per_token_L == K
    assert load(stats.assignments_E).sum() == pytest.approx(1)


def test_all_experts_and_a_threshold_of_one_are_the_dense_mixture(tiny):
    config = tiny(top_p=1.0, experts_per_token=E)
    params = parameters(config)
    probabilities_BTE = jax.nn.softmax(tokens() @ params["router"].T)
    every_BTE = jnp.broadcast_to(jnp.arange(E), (B, T, E))
    assert_close(apply(config, params, {})[0], mixture(params, probabilities_BTE, every_BTE))


def test_a_bias_chooses_and_does_not_weigh(tiny):
    params = parameters(tiny())
    state = {"bias": jnp.array([0.0, 2.0, 0.0, 1.0])}  # experts 1 and 3 of all tokens
    y_BTD, stats, _ = apply(tiny(bias_rate=1e-3), params, state)
    chosen_BTK = jnp.broadcast_to(jnp.array([1, 3]), (B, T, K))
    weights_BTK = jax.nn.softmax(tokens() @ params["router"].T)[..., jnp.array([1, 3])]
    assert_close(y_BTD, mixture(params, weights_BTK, chosen_BTK))
    np.testing.assert_array_equal(load(stats.assignments_E), [0, 0.5, 0, 0.5])


def test_shared_experts_add_one_swiglu_of_their_width_together(tiny):
    config = tiny(shared_experts=2)
    params = parameters(config)
    assert params["shared_gate"].shape == params["shared_up"].shape == (D, 2 * F)
    routed = {name: leaf for name, leaf in params.items() if not name.startswith("shared")}
    shared_BTF = jax.nn.silu(tokens() @ params["shared_gate"]) * (tokens() @ params["shared_up"])
    difference_BTD = apply(config, params, {})[0] - apply(tiny(), routed, {})[0]
    assert_close(difference_BTD, shared_BTF @ params["shared_down"])


def test_where_experts_compete_the_winners_run(tiny):
    config = tiny(router="competition")
    params = parameters(config)

    def observe(layer):
        return layer.routing, layer.auxiliary

    y_BTD, _, (routing, competing) = apply(config, params, {"competing": jnp.array(True)}, observe)
    affinity_BTE = jnp.mean(jnp.log1p(jnp.exp(all_experts(params)[1])), axis=-1)
    tolerance.assert_decided(affinity_BTE, K, terms=2 * D + F + 16)
    expected, q_BTE = competition.winners(affinity_BTE, K)
    np.testing.assert_array_equal(routing.experts_BTK, expected.experts_BTK)
    assert_close(routing.weights_BTK, expected.weights_BTK)
    assert_close(competing.competitors_BTE, q_BTE)
    assert_close(y_BTD, mixture(params, *expected))
    assert competing.active

    y_BTD, _, (routing, competing) = apply(config, params, {"competing": jnp.array(False)}, observe)
    vanilla_BTD, _, vanilla = apply(tiny(), params, {}, lambda layer: layer.routing)
    jax.tree.map(np.testing.assert_array_equal, (y_BTD, routing), (vanilla_BTD, vanilla))
    assert (routing.experts_BTK != expected.experts_BTK).any()
    assert not competing.active and not competing.competitors_BTE.any()


def test_a_layer_can_be_observed(tiny):
    config = tiny(top_p=0.6)

    def observe(layer):
        assert layer.auxiliary is None
        again = layer.score(layer.x_BTD).probabilities_BTE
        return (
            layer.x_BTD,
            layer.mask_BT,
            layer.scores,
            again,
            layer.routing,
            layer.chosen_BTK,
            layer.kept,
        )

    params = parameters(config)
    _, stats, (x_BTD, mask_BT, scores, again, routing, chosen_BTK, kept) = apply(
        config, params, {}, observe
    )
    np.testing.assert_array_equal(x_BTD, tokens())
    np.testing.assert_array_equal(mask_BT, MASK_BT)
    np.testing.assert_array_equal(again, scores.probabilities_BTE)
    full_BTK = routing.experts_BTK < E
    assert not full_BTK.all() and full_BTK[..., 0].all()  # a prefix: some second slots are empty
    np.testing.assert_array_equal(chosen_BTK, full_BTK & MASK_BT[..., None])
    assert StepCounts(*stats[:2]).experts_per_token_L == pytest.approx(
        chosen_BTK.sum() / MASK_BT.sum()
    )
    for name, every in zip(("hidden", "output"), all_experts(params), strict=True):
        chosen = jnp.take_along_axis(
            every, routing.experts_BTK[..., None], axis=2, mode="fill", fill_value=0
        )
        assert_close(kept[name], chosen)


def test_the_sum_of_directions_is_over_all_experts(tiny):
    params = parameters(tiny())
    _, _, found_BTD = apply(tiny(), params, {}, lambda layer: layer.unit_sum_BTD())
    output_BTED = all_experts(params)[1]
    assert_close(
        found_BTD,
        jnp.sum(output_BTED / jnp.linalg.norm(output_BTED, axis=-1, keepdims=True), axis=2),
    )


ROUTES = {  # term: (what it trains, what it does not touch)
    "output_overlap": (EXPERTS, ("router", "x")),
    "routing_variance": (("router",), (*EXPERTS, "x")),
    "competition": (("router", "x"), EXPERTS),
    "specialization": (("w_gate", "w_up", "x"), ("router", "w_down")),
    "routing_entropy": (("router", "x"), EXPERTS),
    "path_coupling": (("router", "x"), EXPERTS),
}


def observer(name):
    """(name, function of a layer, what it keeps) of a loss on single layers."""
    loss = LOSSES[name]
    options = NoOptions() if loss.options is NoOptions else loss.options(reading="paper")
    return name, functools.partial(loss.compute, options), loss.keep


def largest_gradients(config, names, router_state):
    """{term: {parameter or "x": the largest gradient}}, through the module in one backward."""
    module = MoE(config, observers=tuple(observer(name) for name in names))

    def terms(inputs):
        of = {name: leaf for name, leaf in inputs.items() if name != "x"}
        observed = module.apply({"params": of}, inputs["x"], MASK_BT, router_state)[2]
        return {name: jnp.sum(value) for name, value in observed.items()}

    jacobian = jax.jit(jax.jacrev(terms))(parameters(config) | {"x": tokens()})
    return jax.tree.map(lambda leaf: float(jnp.abs(leaf).max()), jacobian)


def assert_routes(found):
    for term, gradients in found.items():
        trained, untouched = ROUTES[term]
        assert {name for name, gradient in gradients.items() if gradient > 1e-5} == set(trained), (
            term
        )
        assert {name for name, gradient in gradients.items() if gradient == 0} == set(untouched), (
            term
        )


def test_a_term_trains_what_its_paper_says(tiny):
    assert ROUTES.keys() == {name for name, loss in LOSSES.items() if loss.kind == "layer"}
    assert_routes(largest_gradients(tiny(), tuple(ROUTES.keys() - {"competition"}), {}))


def test_competition_trains_the_router_alone(tiny):
    assert_routes(
        largest_gradients(
            tiny(router="competition"), ("competition",), {"competing": jnp.array(True)}
        )
    )


def test_variance_of_turned_rows_trains_the_rows_and_not_the_gates_that_turn_them(tiny):
    assert_routes(largest_gradients(tiny(router="mpi"), ("routing_variance",), {}))


@pytest.mark.parametrize("router", ["aoe", "routing_free"])
def test_overlap_trains_both_factors_of_a_gate(tiny, router):
    config = tiny(router=router, rank=4, **{"theta": 0.01} if router == "routing_free" else {})
    [gradients] = largest_gradients(config, ("output_overlap",), {}).values()
    assert min(gradients[name] for name in ("w_low", "w_high", "w_up", "w_down")) > 1e-5
    assert gradients["x"] == 0 and gradients.get("threshold", 0) == 0


def test_overlap_of_factored_gates_has_the_gradient_of_their_product(tiny):
    config = tiny(router="aoe", rank=4)
    params = parameters(config)
    chosen_BTK = apply(config, params, {}, lambda layer: layer.routing)[2].experts_BTK

    def overlap(w_low_EDr):
        whole = params | {"w_gate": jnp.einsum("edr,erf->edf", w_low_EDr, params["w_high"])}
        output_BTKD = jnp.take_along_axis(all_experts(whole)[1], chosen_BTK[..., None], axis=2)
        return output_overlap(output_BTKD, jnp.broadcast_to(MASK_BT[..., None], chosen_BTK.shape))

    def through_the_layer(w_low_EDr):
        module = MoE(config, observers=(observer("output_overlap"),))
        return module.apply({"params": params | {"w_low": w_low_EDr}}, tokens(), MASK_BT, {})[2][
            "output_overlap"
        ]

    expected = jax.jit(jax.value_and_grad(overlap))(params["w_low"])
    found = jax.jit(jax.value_and_grad(through_the_layer))(params["w_low"])
    # The error of sums over D, F and pairs in another order, relative to the largest element.
    largest = float(jnp.abs(expected[1]).max())
    assert largest > 1e-3
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-5 * largest)


def test_where_experts_compete_balance_reads_how_they_answered(tiny):
    config = tiny(router="competition")
    params = parameters(config)
    for active in (True, False):
        state = {"competing": jnp.array(active)}
        _, stats, layer = apply(
            config, params, state, lambda layer: (layer.scores, layer.auxiliary)
        )
        scores, competing = layer
        read_BTE = competing.competitors_BTE if active else scores.probabilities_BTE
        # The probabilities are a mean over 8 tokens.
        np.testing.assert_allclose(stats.probability_E, read_BTE[MASK_BT].mean(axis=0), rtol=1e-5)
        assert (
            abs(stats.probability_E - scores.probabilities_BTE[MASK_BT].mean(axis=0)).max() > 0.01
            or not active
        )


@pytest.mark.parametrize("router", ["softmax", "routing_free"])
def test_forced_balance_routes_evenly_whatever_the_router_says(tiny, router):
    config = dataclasses.replace(tiny(router=router), forced_balance=True)
    params = parameters(config)
    state = config.router.init_state(config).by_layer
    _, stats, _ = apply(config, params, state)
    # Tokens 0 to 9 have the experts 0 and 1, or 2 and 3, in turn. Tokens 8 and 9 are masked.
    np.testing.assert_array_equal(stats.assignments_E, [4, 4, 4, 4])
