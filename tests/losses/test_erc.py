"""ERC against float64 NumPy: golden files, cases by hand, and a reference for every option."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_erc
from tests.tolerance import assert_close

GOLDEN = sorted((pathlib.Path(__file__).parent / "golden").glob("erc_*.npz"))
# Roundings with random_params: sums over D and F, forward and backward, and over pairs of experts.
TERMS = 2 * (8 + 6) + 5**2
# These are compiled as whole programs. One operation at a time would take ten times as long.
coupling_matrix, coupling_penalty, noise_bound, perturb = map(
    jax.jit,
    (moe_erc.coupling_matrix, moe_erc.coupling_penalty, moe_erc.noise_bound, moe_erc.perturb),
)
erc_loss = jax.jit(
    moe_erc.erc_loss,
    static_argnames=(
        "noise",
        "activation",
        "detach_router",
        "normalize",
        "layer_reduction",
        "precision",
    ),
)


def silu(x):
    return x / (1 + np.exp(-x))


def reference_matrix(x_ED, params, activation):
    """M by the definition, with every (E, E, F) activation at once, in float64."""
    gate = np.einsum("id,jdf->ijf", x_ED, params["w_gate"])
    up = np.einsum("id,jdf->ijf", x_ED, params["w_up"])
    hidden = silu(gate) * up
    output = np.einsum("ijf,jfd->ijd", hidden, params["w_down"])
    values = {"gate": gate, "up": up, "silu_gate": silu(gate), "swiglu": hidden, "output": output}
    return np.linalg.norm(values[activation], axis=-1)


def reference_penalty(M_EE, alpha):
    """Equation 3 as a double loop."""
    experts = len(M_EE)
    total = 0.0
    for i in range(experts):
        for j in range(experts):
            if i != j:
                total += max(M_EE[i, j] - alpha * M_EE[i, i], 0) + max(
                    M_EE[j, i] - alpha * M_EE[i, i], 0
                )
    return total / experts**2


def random_params(E=5, D=8, F=6, layers=None, seed=0):
    rng = np.random.default_rng(seed)
    stack = () if layers is None else (layers,)
    shapes = {"router": (E, D), "w_gate": (E, D, F), "w_up": (E, D, F), "w_down": (E, F, D)}
    return {
        name: rng.normal(size=stack + shape).astype(np.float32) for name, shape in shapes.items()
    }


# ------------------------------------------------------------ golden files
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_values_and_gradients(path):
    golden = np.load(path, allow_pickle=False)
    router, w_gate, noise = (jnp.float32(golden[name]) for name in ("router", "w_gate", "noise"))
    alpha = float(golden["alpha"])

    experts, width, hidden = w_gate.shape

    def check(suffix, loss_of):
        loss, gradients = jax.value_and_grad(loss_of, argnums=(0, 1))(router, w_gate)
        # The loss is a mean of differences of responses. Its error is a few units of the largest
        # response, and that of a sum over D of its own size.
        largest = (
            golden[f"coupling_matrix{suffix}"].max() / (width + hidden) + golden[f"loss{suffix}"]
        )
        assert_close(loss, golden[f"loss{suffix}"], terms=width + hidden, largest=largest)
        if f"grad_router{suffix}" in golden:
            for gradient, name in zip(gradients, ("grad_router", "grad_w_gate"), strict=True):
                expected = golden[name + suffix]
                assert_close(gradient, expected, terms=width + hidden + experts)

    assert_close(noise_bound(router), golden["noise_bound"], terms=width)
    for proxies, suffix in ((router * noise, ""), (router, "_without_noise")):
        assert_close(
            coupling_matrix(proxies, w_gate),
            golden[f"coupling_matrix{suffix}"],
            terms=width + hidden,
        )
    check("", lambda r, w: coupling_penalty(coupling_matrix(r * noise, w), alpha))
    check(
        "_without_noise",
        lambda r, w: erc_loss({"router": r, "w_gate": w}, None, alpha=alpha, noise="none"),
    )
    check(
        "_expected",
        lambda r, w: erc_loss({"router": r, "w_gate": w}, None, alpha=alpha, noise="expected"),
    )


def test_golden_files_are_all_here():
    assert len(GOLDEN) == 10


# ------------------------------------------------------------ by hand
def test_penalty_by_hand():
    # The diagonal is (2, 4, 1). alpha 0.5 gives the bars (1, 2, 0.5).
    # Off the diagonal, M01 = 3, M12 = 1, M20 = 2; other entries are 0.
    # M01 exceeds bar 0 by 2 and bar 1 by 1
    # M12 exceeds bar 1 by 0 and bar 2 by 0.5
    # M20 exceeds bar 2 by 1.5 and bar 0 by 1
    M_EE = jnp.array([[2.0, 3.0, 0.0], [0.0, 4.0, 1.0], [2.0, 0.0, 1.0]])
    assert coupling_penalty(M_EE, 0.5) == pytest.approx((2 + 1 + 0 + 0.5 + 1.5 + 1) / 9)
    # alpha 1 gives the bars (2, 4, 1): M01 exceeds by 1 and 0, M12 by 0 and 0, M20 by 1 and 0.
    assert coupling_penalty(M_EE, 1.0) == pytest.approx(2 / 9)
    assert coupling_penalty(M_EE, 3.0) == 0.0


def test_noise_bound_by_hand():
    # Distances |r0 - r1| = sqrt 2, |r0 - r2| = 2, |r1 - r2| = sqrt 10; lengths 1, 1, 3.
    router_ED = jnp.array([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    assert_close(noise_bound(router_ED), [2**0.5 / 2, 2**0.5 / 2, 2 / (2 * 3)], terms=8)


def test_coupling_matrix_by_hand():
    # Row (1, 2) through [[3, 0], [0, 2]] is (3, 4) of norm 5, through the identity it has sqrt 5.
    # Row (2, 0) gives (6, 0) and (2, 0).
    w_gate_EDF = jnp.array([[[3.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]]])
    M_EE = coupling_matrix(jnp.array([[1.0, 2.0], [2.0, 0.0]]), w_gate_EDF)
    assert_close(M_EE, [[5.0, 5**0.5], [6.0, 2.0]], terms=8)


def test_noise_bound_of_close_rows_keeps_its_digits():
    # A Gram matrix in float32 would give a distance of 0 or of several times 1e-4.
    router_ED = jnp.array([[1.0, 1.0, 1.0], [1.0 + 2**-13, 1.0, 1.0], [-1.0, 0.0, 0.0]])
    assert noise_bound(router_ED)[0] == pytest.approx(2**-13 / (2 * 3**0.5), rel=1e-6)


# ------------------------------------------------------------ perturbation
def test_perturb_draws_uniformly_inside_the_bound_and_is_constant_to_the_gradient():
    router_ED, key = jnp.float32(random_params()["router"]), jax.random.key(7)
    bound_E1 = np.asarray(noise_bound(router_ED))[:, None]
    noise_ED = 1 - bound_E1 + 2 * bound_E1 * np.asarray(jax.random.uniform(key, router_ED.shape))
    assert_close(perturb(router_ED, key), router_ED * noise_ED, terms=8)
    gradient_ED = jax.grad(lambda router: jnp.sum(perturb(router, key)))(router_ED)
    assert_close(gradient_ED, noise_ED, terms=8)  # d(router * noise) with noise held fixed


def test_proxies_stay_in_their_own_cluster():
    router_ED = jnp.float32(random_params(E=9, D=5)["router"])
    for seed in range(50):
        distance_EE = np.linalg.norm(
            perturb(router_ED, jax.random.key(seed))[:, None] - router_ED[None], axis=-1
        )
        assert (np.argmin(distance_EE, axis=1) == np.arange(9)).all()


# ------------------------------------------------------------ options
@pytest.mark.parametrize("activation", ["gate", "up", "silu_gate", "swiglu", "output"])
def test_every_activation_matches_the_definition(activation):
    params, key, alpha = random_params(), jax.random.key(3), 0.7
    loss = erc_loss(params, key, alpha=alpha, activation=activation)
    proxy_ED = np.asarray(perturb(params["router"], key), np.float64)
    M_EE = reference_matrix(proxy_ED, params, activation)
    assert_close(loss, reference_penalty(M_EE, alpha), TERMS, largest=M_EE.max())


@pytest.mark.parametrize("options", [
    {"activation": "gate"}, {"activation": "swiglu"}, {"activation": "output"},
    {"noise": "expected"}, {"noise": "none"},
    {"normalize": True}, {"normalize": True, "noise": "expected"},
], ids=str)  # fmt: skip
def test_gradients_match_finite_differences(options):
    params, key = random_params(), jax.random.key(3)
    value, gradient = jax.value_and_grad(
        lambda params: erc_loss(params, key, alpha=0.7, **options)
    )(params)
    exact = {name: np.float64(leaf) for name, leaf in params.items()}
    # The gradient takes noise as constant. Proxies are a fixed multiple of the router, and so is
    # what expected noise adds to squares.
    noise_ED = (
        np.float64(perturb(params["router"], key)) / exact["router"]
        if "noise" not in options
        else 1.0
    )
    bound_E1 = (
        np.float64(noise_bound(params["router"]))[:, None]
        if options.get("noise") == "expected"
        else 0.0
    )

    def loss(exact):
        return reference_penalty(reference_response(exact, noise_ED, bound_E1, options), 0.7)

    largest = reference_response(exact, noise_ED, bound_E1, options).max()
    assert_close(value, loss(exact), TERMS, largest=largest)
    for name, leaf in exact.items():
        direction, step = np.random.default_rng(1).normal(size=leaf.shape), 1e-6
        ahead, behind = (loss(exact | {name: leaf + sign * step * direction}) for sign in (1, -1))
        slope = np.float32((ahead - behind) / (2 * step))  # to 1e-9, in float64
        assert_close(
            np.float32(np.sum(gradient[name] * direction)),
            slope,
            TERMS,
            largest=max(largest, abs(slope)),
        )


def reference_response(params, noise_ED, bound_E1, options):
    """What the hinges compare, (E, E) in float64.

    It is M of the noisy, expected or clean proxies, and relative where `normalize` is set.
    """
    M_EE = reference_matrix(params["router"] * noise_ED, params, options.get("activation", "gate"))
    squares_ED = (bound_E1 * params["router"]) ** 2 / 3
    M_EE = np.sqrt(M_EE**2 + squares_ED @ np.sum(params["w_gate"] ** 2, axis=-1).T)
    if not options.get("normalize"):
        return M_EE
    length2_E = np.sum((params["router"] * noise_ED) ** 2 + squares_ED, axis=-1)
    of_gate_E = np.linalg.norm(params["w_gate"], axis=(1, 2))
    return np.sqrt(params["router"].shape[1]) * M_EE / (np.sqrt(length2_E)[:, None] * of_gate_E)


def test_expected_square_is_the_mean_over_draws():
    params = random_params()
    draws = jax.vmap(lambda key: coupling_matrix_squared(params, key))(
        jax.random.split(jax.random.key(0), 20_000)
    )
    bound_E1 = np.asarray(noise_bound(params["router"]), np.float64)[:, None]
    clean_EE = reference_matrix(np.float64(params["router"]), params, "gate") ** 2
    added_EE = (bound_E1**2 / 3 * params["router"] ** 2) @ np.sum(
        np.float64(params["w_gate"]) ** 2, axis=-1
    ).T
    # The keys of the 20,000 draws are the same on every machine. Two sigma of the mean squares are
    # 1 %, and no square is near 0.
    np.testing.assert_allclose(np.mean(draws, axis=0), clean_EE + added_EE, rtol=0.02)


def coupling_matrix_squared(params, key):
    return jnp.sum(
        jnp.einsum("id,jdf->ijf", perturb(params["router"], key), params["w_gate"]) ** 2, axis=-1
    )


def test_detached_router_has_exactly_no_gradient_and_the_gate_the_same():
    params, key = random_params(), jax.random.key(0)
    both = jax.grad(lambda params: erc_loss(params, key))(params)
    detached = jax.grad(lambda params: erc_loss(params, key, detach_router=True))(params)
    assert np.linalg.norm(both["router"]) > 0.1
    assert not detached["router"].any()
    np.testing.assert_array_equal(detached["w_gate"], both["w_gate"])
    assert not both["w_up"].any() and not both["w_down"].any()


@pytest.mark.parametrize(("options", "trained"), [
    ({}, {"router", "w_gate"}),
    ({"detach_router": True}, {"w_gate"}),
    ({"layer_reduction": "sum"}, {"router", "w_gate"}),
    ({"noise": "none"}, {"router", "w_gate"}),
    ({"noise": "expected"}, {"router", "w_gate"}),
    ({"activation": "up"}, {"router", "w_up"}),
    ({"activation": "silu_gate"}, {"router", "w_gate"}),
    ({"activation": "swiglu"}, {"router", "w_gate", "w_up"}),
    ({"activation": "output"}, {"router", "w_gate", "w_up", "w_down"}),
])  # fmt: skip
def test_who_receives_a_gradient_under_each_reading(options, trained):
    gradients = jax.grad(functools.partial(erc_loss, **options))(random_params(), jax.random.key(0))
    assert {name for name, leaf in gradients.items() if np.any(leaf)} == trained


@pytest.mark.parametrize("noise", ["uniform", "expected"])
@pytest.mark.parametrize("name", ["router", "w_gate"])
def test_normalized_loss_ignores_scale_and_the_plain_one_is_of_degree_one(name, noise):
    params, key = random_params(), jax.random.key(0)
    smaller = params | {name: params[name] * 0.25}
    for normalize, ratio in ((True, 1.0), (False, 0.25)):
        options = {"noise": noise, "normalize": normalize, "alpha": 0.6}
        assert_close(
            erc_loss(smaller, key, **options), ratio * erc_loss(params, key, **options), TERMS
        )


def test_normalized_response_of_an_isotropic_gate_is_one():
    # |r I| sqrt(D) / (|r| |I|_F) = 1 for all pairs.
    # At alpha 0 the loss is 2 (E^2 - E) / E^2 = 2 * 6 / 9.
    params = {
        "router": random_params(E=3, D=4)["router"],
        "w_gate": 7 * np.stack([np.eye(4, dtype=np.float32)] * 3),
    }
    assert erc_loss(params, None, alpha=0.0, noise="none", normalize=True) == pytest.approx(
        12 / 9, rel=1e-6
    )


def test_stacked_layers_draw_from_split_keys_and_reduce():
    stacked, key = random_params(layers=3), jax.random.key(5)
    layers = [jax.tree.map(lambda leaf, index=index: leaf[index], stacked) for index in range(3)]
    single = [
        erc_loss(layer, layer_key)
        for layer, layer_key in zip(layers, jax.random.split(key, 3), strict=True)
    ]
    assert_close(erc_loss(stacked, key), np.mean(single), TERMS)
    assert_close(erc_loss(stacked, key, layer_reduction="sum"), np.sum(single), TERMS)
    gradient = jax.grad(lambda params: erc_loss(params, key, layer_reduction="sum"))(stacked)
    alone = jax.grad(lambda params: erc_loss(params, jax.random.split(key, 3)[1]))(layers[1])
    for name in ("router", "w_gate"):
        assert_close(gradient[name][1], alone[name], TERMS)


@pytest.mark.parametrize("options, named", [
    ({"noise": "gaussian"}, "gaussian"),
    ({"activation": "relu"}, "relu"),
    ({"layer_reduction": "max"}, "max"),
    ({"activation": "swiglu", "noise": "expected"}, "expected"),
    ({"activation": "output", "normalize": True}, "normalize"),
    ({}, "rng"),
])  # fmt: skip
def test_options_without_meaning_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        erc_loss(random_params(), None, **options)


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf")])
def test_an_alpha_that_is_no_share_is_refused(alpha):
    with pytest.raises(ValueError, match=r"^alpha: "):
        moe_erc.erc_loss(random_params(), None, alpha=alpha, noise="none")


# ------------------------------------------------------------ edges
@pytest.mark.parametrize(
    "case", ["one expert", "twin rows", "zero row", "zero router", "zero gate"]
)
@pytest.mark.parametrize("options", [{}, {"noise": "expected"}, {"normalize": True}], ids=str)
def test_degenerate_parameters_give_finite_values_and_gradients(case, options):
    params = random_params(E=1 if case == "one expert" else 4)
    if case == "twin rows":
        params["router"][1] = params["router"][0]
        assert noise_bound(params["router"])[0] == 0
    elif case == "zero row":
        params["router"][2] = 0
        assert noise_bound(params["router"])[2] == 0
    elif case == "zero router":
        params["router"][:] = 0
    elif case == "zero gate":
        params["w_gate"][:] = 0
    loss, gradients = jax.value_and_grad(
        lambda params: erc_loss(params, jax.random.key(0), **options)
    )(params)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    if case in ("one expert", "zero router", "zero gate"):
        assert loss == 0
        assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


def test_bfloat16_weights_are_summed_in_float32():
    params = random_params(E=8, D=64, F=48)
    low = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), low)
    # These are sums over D, F and pairs. In bfloat16 their error would be 2^-9.
    assert_close(
        erc_loss(low, None, noise="none"),
        erc_loss(rounded, None, noise="none"),
        terms=64 + 48 + 8 * 8,
    )


# ------------------------------------------------------------ cost
def test_an_expert_with_no_active_hinge_gets_exactly_no_gradient_and_its_backward_is_a_branch():
    # Rows are orthogonal, and each gate responds to its own row alone, so no hinge is active. Only
    # expert 3 also responds to row 0.
    router_ED = np.eye(4, 6, dtype=np.float32)
    w_gate_EDF = np.zeros((4, 6, 3), np.float32)
    for expert in range(4):
        w_gate_EDF[expert, expert] = 1.0
    w_gate_EDF[3, 0] = 2.0
    gradient = jax.jit(jax.grad(lambda params: erc_loss(params, None, noise="none")))
    found = gradient({"router": router_ED, "w_gate": w_gate_EDF})["w_gate"]
    # Row 0 exceeds both diagonals at expert 3. Its gradient lowers expert 3 at row 0, raises expert
    # 3 at its own row, and raises expert 0 at row 0. Experts 1 and 2 get none.
    assert found[3].any() and found[0].any()
    assert not found[1].any() and not found[2].any()
    program = gradient.lower({"router": router_ED, "w_gate": w_gate_EDF}).compile().as_text()
    assert "conditional(" in program


@pytest.mark.parametrize("layers", [None, 2])
def test_memory_stays_below_20_mb_at_the_papers_size(layers):
    stack = () if layers is None else (layers,)
    shapes = {"router": (64, 1536), "w_gate": (64, 1536, 768)}
    params = {
        name: jax.ShapeDtypeStruct(stack + shape, jnp.float32) for name, shape in shapes.items()
    }
    value_and_grad = jax.jit(jax.value_and_grad(lambda params, key: erc_loss(params, key)))
    compiled = value_and_grad.lower(params, jax.eval_shape(lambda: jax.random.key(0))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 20e6


def test_at_initialization_m_and_the_bound_are_those_of_random_vectors():
    E, D, F, std = 32, 384, 192, 0.02
    keys = jax.random.split(jax.random.key(0), 2)
    router_ED, w_gate_EDF = (
        std * jax.random.normal(keys[0], (E, D)),
        std * jax.random.normal(keys[1], (E, D, F)),
    )
    M_EE = coupling_matrix(router_ED, w_gate_EDF)
    # E |r W|^2 = F std^2 |r|^2 and |r|^2 = D std^2, so M is std^2 sqrt(D F), 0.434 at the paper's
    # sizes. The length of a row deviates by 1 / sqrt(2 D), so the mean of 32 rows by 0.6 %. The
    # draws are the same on every machine.
    assert jnp.mean(M_EE) == pytest.approx(std**2 * (D * F) ** 0.5, rel=0.02)
    # Orthogonal rows of equal length are sqrt(2) lengths apart, so the bound is sqrt(2) / 2. It is
    # a little less for the nearest of many rows.
    assert 0.60 < float(jnp.mean(noise_bound(router_ED))) < 2**0.5 / 2
