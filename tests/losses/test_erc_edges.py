"""ERC at the edges of float32: no draw leaves its cluster, only NaN gives NaN, no NaN is lost."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_erc import erc_loss, perturb, sharding
from moe_erc.training.guard import GuardConfig, initial, judge
from tests.tolerance import assert_close, magnitude, within

E, D, F = 4, 3, 2
LINEAR = ({}, {"noise": "expected"}, {"normalize": True}, {"noise": "expected", "normalize": True})
OPTIONS = (*LINEAR, {"activation": "swiglu"}, {"activation": "output"})
DEFECTS = ("none", "twin rows", "zero row", "zero router", "zero gate", "far row", "vanishing row")
repeatable = settings(deadline=None, max_examples=30, derandomize=True)


def random_params(seed, experts=E):
    rng = np.random.default_rng(seed)
    shapes = {
        "router": (experts, D),
        "w_gate": (experts, D, F),
        "w_up": (experts, D, F),
        "w_down": (experts, F, D),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def is_finite(tree):
    return all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(tree))


def drawing(uniform_ED):
    """Makes `jax.random.uniform` return these numbers in what is traced inside."""
    return mock.patch("jax.random.uniform", lambda *_: uniform_ED)


@pytest.fixture(scope="module")
def value_and_grad():
    """Value and gradient of the loss with some options, compiled once per shape and dtype."""
    compiled = {}

    def make(**options):
        def loss(params, uniform_ED):
            with drawing(uniform_ED):
                return erc_loss(params, jax.random.key(0), alpha=0.7, **options)

        return compiled.setdefault(str(options), jax.jit(jax.value_and_grad(loss)))

    return make


# ------------------------------------------------------------ the cluster
LAST = 1 - 2.0**-23  # the largest number below 1 that a draw can give
draw = st.sampled_from([0.0, 2.0**-23, 0.25, 0.5, LAST]) | st.floats(0, LAST, width=32)
draws = st.lists(draw, min_size=E * D, max_size=E * D).map(
    lambda numbers: np.float32(numbers).reshape(E, D)
)
smaller = st.lists(st.sampled_from([0, 4, 9]), min_size=E, max_size=E)
whole = st.lists(st.integers(-2, 2), min_size=E * D, max_size=E * D)


@jax.jit
def proxies(router_ED, uniform_ED):
    with drawing(uniform_ED):
        return perturb(router_ED, None)


def assert_in_own_cluster(router_ED, uniform_ED):
    proxy_ED, row_ED = np.float64(proxies(router_ED, uniform_ED)), np.float64(router_ED)
    distance_EE = np.linalg.norm(proxy_ED[:, None] - row_ED[None], axis=-1)
    for i in range(E):
        for j in range(E):
            if (row_ED[i] != row_ED[j]).any():
                assert distance_EE[i, i] < distance_EE[i, j], (router_ED, uniform_ED, i, j)
            elif i != j:
                assert (proxy_ED[i] == row_ED[i]).all()  # a twin has no room at all


@repeatable
@given(whole, draws, st.sampled_from([-26, -20, 0, 15, 30]), smaller)
def test_no_draw_leaves_its_cluster(numbers, uniform_ED, exponent, apart):
    # The numbers are small and whole, so that parallel rows, zero rows and twins are common.
    router_ED = (
        np.float32(numbers).reshape(E, D)
        * np.float32(10.0) ** (exponent - np.float32(apart))[:, None]
    )
    assert_in_own_cluster(router_ED, uniform_ED)


@repeatable
@given(whole, draws, st.sampled_from([1, 2, 30, 1000]), st.integers(0, 99))
def test_no_draw_leaves_the_cluster_of_a_row_that_differs_in_its_last_bits(
    steps, uniform_ED, spacing, seed
):
    row_D = np.random.default_rng(seed).uniform(1, 2, D).astype(np.float32)
    assert_in_own_cluster(
        row_D + np.float32(2.0**-23 * spacing) * np.float32(steps).reshape(E, D), uniform_ED
    )


def test_the_ends_of_the_interval_are_reached_but_for_a_rounding():
    # The first two rows are 1 apart, so the bound of the first row is 0.5. Draws of 0 and of almost
    # 1 take it to 0.5 and 1.5.
    router_ED = np.float32([[1, 0, 0], [0, 0, 0], [9, 0, 0], [0, 9, 0]])
    # The code takes a bound that is smaller by 2^-21, four units. So are the ends.
    for number, end in ((0.0, 0.5), (LAST, 1.5)):
        assert proxies(router_ED, np.full((E, D), np.float32(number)))[0, 0] == pytest.approx(
            end, abs=within(16)
        )


# ------------------------------------------------------------ finite
def damaged(params, defect):
    router_ED = params["router"]
    if defect == "twin rows":
        router_ED[-1] = router_ED[0]
    elif defect == "zero gate":
        params["w_gate"][0] = 0
    elif defect == "zero router":
        router_ED[:] = 0
    elif defect != "none":
        router_ED[0] *= np.float32({"zero row": 0, "far row": 1e3, "vanishing row": 1e-37}[defect])
    return params


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@repeatable
@given(
    st.integers(0, 99), st.sampled_from(DEFECTS), st.integers(-45, 14), st.integers(-45, 14), draws
)
def test_what_is_finite_stays_finite(
    value_and_grad, options, seed, defect, router_scale, gate_scale, uniform_ED
):
    params = random_params(seed)
    # M is linear in the router and in the gate, and has to stay below 1e18. A far row is 1e3 times
    # as long. The nonlinear activations also multiply the router by the up-projection, so that it
    # counts twice: 1e8 1e6 and some tens for sums of normal draws.
    gate_scale = min(gate_scale, 14 - router_scale)
    if options not in LINEAR:
        router_scale = min(router_scale, 4)
        gate_scale = min(gate_scale, 0)
    with np.errstate(under="ignore"):
        params["router"] *= np.float32(10.0**router_scale)
        params["w_gate"] *= np.float32(10.0**gate_scale)
        assert is_finite(value_and_grad(**options)(damaged(params, defect), uniform_ED))


@pytest.mark.parametrize("experts", [1, 2])
@repeatable
@given(st.integers(0, 99), st.sampled_from(DEFECTS), st.integers(-25, 14), draws)
def test_one_and_two_experts_are_finite(value_and_grad, experts, seed, defect, scale, uniform_ED):
    params = random_params(seed, experts)
    params["router"] *= np.float32(10.0**scale)
    loss, gradients = value_and_grad(normalize=True)(damaged(params, defect), uniform_ED[:experts])
    assert is_finite((loss, gradients))
    assert experts == 2 or (
        loss == 0 and not any(leaf.any() for leaf in jax.tree.leaves(gradients))
    )


@pytest.mark.parametrize("options", [{}, {"noise": "expected", "normalize": True}], ids=str)
@repeatable
@given(st.integers(0, 99), st.sampled_from(DEFECTS), st.integers(-30, 14), draws)
def test_bfloat16_is_finite(value_and_grad, options, seed, defect, scale, uniform_ED):
    params = damaged(random_params(seed), defect)
    params["router"] *= np.float32(10.0**scale)
    low = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    loss, gradients = value_and_grad(**options)(low, uniform_ED)
    assert is_finite((loss, gradients)) and loss.dtype == jnp.float32
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(gradients))


# ------------------------------------------------------------ small scales
@pytest.mark.parametrize(
    "options", [{"normalize": True}, {"noise": "expected", "normalize": True}], ids=str
)
def test_the_normalized_gradient_is_that_of_a_larger_router(value_and_grad, options):
    # The loss ignores the scale s of the router, so its gradient goes with 1 / s.
    params, uniform_ED = random_params(0), np.full((E, D), np.float32(0.3))
    loss, gradients = value_and_grad(**options)(params, uniform_ED)
    small = params | {"router": params["router"] * np.float32(2.0**-45)}
    found, found_gradients = value_and_grad(**options)(small, uniform_ED)
    terms = 2 * (D + F) + E * E  # forward and backward, and the pairs
    assert_close(found, loss, terms)
    assert_close(found_gradients["router"] * 2.0**-45, gradients["router"], terms)
    assert loss > 0


# ------------------------------------------------------------ permutations
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@repeatable
@given(st.integers(0, 99), st.permutations(range(E)), draws)
def test_the_order_of_experts_does_not_matter(value_and_grad, options, seed, order, uniform_ED):
    params, order = random_params(seed), np.array(order)
    loss, gradients = value_and_grad(**options)(params, uniform_ED)
    moved = jax.tree.map(lambda leaf: leaf[order], params)
    found, found_gradients = value_and_grad(**options)(moved, uniform_ED[order])
    # Permutations change the order of sums of E^2 numbers. The numbers are differences of responses
    # as large as the largest gradient.
    largest = max(1.0, *(magnitude(gradient) for gradient in gradients.values()))
    expected = jax.tree.map(lambda gradient: gradient[order], gradients)
    assert_close(
        (found, found_gradients), (loss, expected), terms=2 * (D + F) + E * E, largest=largest
    )


# ------------------------------------------------------------ NaN
def spoilt(seed, name, place, number):
    params = random_params(seed)
    params[name].flat[place % params[name].size] = number
    return params


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@repeatable
@given(st.integers(0, 99), st.sampled_from(["router", "w_gate"]), st.integers(0, 99),
       st.sampled_from([np.nan, np.inf, -np.inf]), draws)  # fmt: skip
def test_what_is_not_finite_reaches_the_guard(
    value_and_grad, options, seed, name, place, number, uniform_ED
):
    loss, _ = value_and_grad(**options)(spoilt(seed, name, place, number), uniform_ED)
    assert not np.isfinite(loss)
    counts, _, _ = judge(GuardConfig(), initial(), {"loss/total": loss})
    assert not counts


@pytest.mark.parametrize("name", ["router", "w_gate"])
def test_what_is_not_finite_reaches_the_guard_from_any_device(name):
    mesh = sharding.make_mesh(2, 2)
    loss = jax.jit(lambda params: erc_loss(params, jax.random.key(0), mesh=mesh))
    assert np.isfinite(loss(random_params(0)))
    assert np.isnan(loss(spoilt(0, name, 0, np.nan))) and np.isnan(
        loss(spoilt(0, name, -1, np.nan))
    )
