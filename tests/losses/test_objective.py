"""The objective: names, weights and sums of losses."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.checks import BadInput
from moe_erc.losses import LOSSES
from moe_erc.losses.erc import erc_loss
from moe_erc.losses.objective import Objective
from moe_erc.model.transformer import Transformer
from moe_erc.moe.routers import ROUTERS
from moe_erc.random_keys import named
from moe_erc.training.step import parameter_only
from tests.tolerance import assert_close


def output():
    routing = types.SimpleNamespace(
        assignments_E=jnp.array([[2, 2]]),
        probability_E=jnp.array([[0.75, 0.25]]),
        logsumexp2=jnp.array([3.0]),
    )
    return types.SimpleNamespace(
        x_BTD=jnp.ones((1, 1, 1)),
        head_VD=jnp.zeros((4, 1)),
        routing=routing,
        observed={
            "routing_variance": jnp.array([-0.5, -0.25]),
            "path_coupling": jnp.full((2, 1, 1), 0.5),
        },
    )


@pytest.fixture(scope="module")
def model(model_config):
    """Makes a Transformer without a mesh, some fields of its config changed."""
    return lambda **changes: Transformer(model_config(**changes))


PAPER = {"reading": "paper"}
ERC = {
    "weight": 1.0,
    "alpha": 1.0,
    "noise": "uniform",
    "activation": "gate",
    "detach_router": False,
    "normalize": False,
    "layer_reduction": "mean",
    "precision": "high",
}
BATCH = {"targets_BT": jnp.zeros((1, 1), jnp.int32), "mask_BT": jnp.ones((1, 1), bool)}


def test_terms_are_unweighted_and_the_total_is_weighted(model):
    losses = {
        "lm": {"weight": 1.0, "chunk": 8},
        "load_balance": {"weight": 0.5, "scope": "micro_batch"},
        "router_z": {"weight": 2.0},
        "routing_variance": PAPER | {"weight": 4.0},
        "path_coupling": {"weight": 8.0},
    }
    terms = Objective(losses, model()).of_batch(output(), BATCH, None)
    # lm: uniform over 4 tokens, ln 4
    # load_balance: 2 * (0.5 * 0.75 + 0.5 * 0.25) = 1
    # router_z: 3
    # routing_variance: a mean of two layers
    # path_coupling: -0.5 * 0.5 of one token
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(
        {
            "lm": 1.386294,
            "load_balance": 1.0,
            "router_z": 3.0,
            "routing_variance": -0.375,
            "path_coupling": -0.25,
        }
    )
    assert Objective(losses, model()).total(terms, {}) == pytest.approx(
        1.386294 + 0.5 + 6.0 - 1.5 - 2.0
    )


def test_scales_multiply_the_weights_of_their_terms_alone(model):
    losses = {
        "lm": {"weight": 2.0, "chunk": 8},
        "load_balance": {"weight": 0.5, "scope": "micro_batch"},
    }
    # 2 * 3 + 0.5 * 1.5 * 4
    assert (
        Objective(losses, model()).total({"lm": 3.0, "load_balance": 4.0}, {"load_balance": 1.5})
        == 9.0
    )


def test_balance_over_the_step_counts_earlier_micro_batches(model):
    losses = {"load_balance": {"weight": 1.0, "scope": "step"}}
    # Earlier counts (10, 2) and these (2, 2) are (12, 4) together:
    # 2 * (12/16 * 0.75 + 4/16 * 0.25) = 1.25. A mean of shares would be (2/3, 1/3).
    terms = Objective(losses, model()).of_batch(output(), BATCH, jnp.array([[10, 2]]))
    assert terms["load_balance"] == pytest.approx(1.25)


def test_a_loss_of_weight_zero_is_not_computed(model, monkeypatch):
    never = dataclasses.replace(LOSSES["erc"], compute=lambda *_: pytest.fail("computed"))
    monkeypatch.setitem(LOSSES, "erc", never)
    nothing = Objective(
        {"erc": ERC | {"weight": 0.0}, "output_overlap": PAPER | {"weight": 0.0}}, model()
    )
    assert nothing.of_parameters({}, jax.random.key(0)) == {} and nothing.observers == ()


def test_observers_are_the_active_terms_of_single_layers_with_what_they_keep(model):
    losses = {
        "lm": {"weight": 1.0, "chunk": 8},
        "output_overlap": PAPER | {"weight": 1.0},
        "routing_entropy": {"weight": 1.0},
    }
    observers = Objective(losses, model()).observers
    assert [(name, keep) for name, _, keep in observers] == [
        ("output_overlap", ("output",)),
        ("routing_entropy", ()),
    ]


def test_erc_reads_the_stacked_moe_parameters(model):
    moe = {"router": jnp.ones((2, 1, 3)), "w_gate": jnp.ones((2, 1, 3, 2))}
    terms = Objective({"erc": ERC}, model()).of_parameters(
        {"layers": {"moe": moe}}, jax.random.key(0)
    )
    assert terms == {"erc": 0.0}  # one expert has no foreign pair


def random_moe(layers=2, experts=4, width=8, hidden=4):
    keys = jax.random.split(jax.random.key(1), 2)
    moe = {
        "router": jax.random.normal(keys[0], (layers, experts, width)),
        "w_gate": jax.random.normal(keys[1], (layers, experts, width, hidden)),
    }
    return {"layers": {"moe": moe}, "embed": jnp.ones((3, width))}


def test_erc_of_mpi_is_that_of_the_turned_rows(model):
    params, rng, turning = random_moe(), jax.random.key(0), model(router="mpi")
    moe = params["layers"]["moe"]
    found = Objective({"erc": ERC}, turning).of_parameters(params, rng)["erc"]
    turned_LED = jax.vmap(lambda of_layer: turning.config.router.rows(turning.config, of_layer))(
        moe
    )
    key = named(rng, "losses.erc")
    # Roundings: sums over 8 and 4, which the power step has twice, and over the 16 pairs.
    assert_close(found, erc_loss(moe | {"router": turned_LED}, key), terms=3 * (8 + 4) + 16)
    assert abs(found - erc_loss(moe, key)) > 0.1  # the loss of the unturned rows differs


def orthogonality(decoupled):
    return {"router_orthogonality": {"weight": 0.5, "decoupled": decoupled}}


def two_rows():
    """One layer, two experts with rows (2, 0) and (1, 1), and other parameters."""
    params = random_moe(1, 2, 2)
    params["layers"]["moe"]["router"] = jnp.array([[[2.0, 0.0], [1.0, 1.0]]])
    return params


def test_a_decoupled_loss_is_logged_but_no_part_of_total_and_gradient(model):
    params = two_rows()
    for decoupled in (True, False):
        goal = Objective(orthogonality(decoupled), model())
        terms, gradients = parameter_only(goal, params, None, {})
        # The cosine 1/sqrt 2 occurs twice: 2 * 1/2 / 2^2.
        assert terms["router_orthogonality"] == pytest.approx(0.25)
        assert goal.total(terms, {}) == pytest.approx(0.0 if decoupled else 0.125)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients)) == decoupled


def test_decoupling_subtracts_weight_times_gradient_from_the_router_alone(model):
    params = two_rows()
    # loss = 2 c^2 / 4 with c = a.b / |a||b|, a = (2, 0), b = (1, 1)
    # dloss/dc = c = 1/sqrt 2
    # dc/da = (b^ - c a^) / |a| = ((1/sqrt 2, 1/sqrt 2) - (1/sqrt 2, 0)) / 2 = (0, 1/sqrt 8)
    # dc/db = (a^ - c b^) / |b| = ((1, 0) - (1/2, 1/2)) / sqrt 2 = (1/sqrt 8, -1/sqrt 8)
    # gradients: (0, 1/4) of a and (1/4, -1/4) of b
    found = Objective(orthogonality(True), model()).decouple(params)
    router_LED = found["layers"]["moe"].pop("router")
    assert_close(router_LED, [[[2, -0.125], [0.875, 1.125]]], terms=8)
    del params["layers"]["moe"]["router"]
    jax.tree.map(np.testing.assert_array_equal, found, params)
    coupled = Objective(orthogonality(False), model()).decouple(two_rows())
    jax.tree.map(np.testing.assert_array_equal, coupled, two_rows())


@pytest.mark.parametrize("losses, words", [
    ({"ercc": {"weight": 1.0}}, ["losses.ercc", "'erc'"]),
    ({"lm": {"weight": -1.0}}, ["losses.lm.weight", "-1.0"]),
    ({"lm": {"weight": float("nan")}}, ["losses.lm.weight", "nan"]),
    ({"lm": {"weight": 1.0, "chunk": 0}}, ["losses.lm.chunk", "0", "1"]),
    ({"lm": {"weight": 1.0}}, ["losses.lm.chunk", "missing"]),
    ({"lm": {"weight": 1.0, "chunk": 8, "chunks": 8}}, ["losses.lm.chunks", "chunk"]),
    ({"simbal": {"weight": 1.0, "scale": 2.0}}, ["losses.simbal.scale", "none"]),
    ({"erc": ERC | {"noise": "gauss"}}, ["losses.erc.noise", "gauss"]),
    ({"erc": ERC | {"alpha": -0.5}}, ["losses.erc.alpha", "-0.5"]),
    ({"erc": ERC | {"precision": "higher"}},
     ["losses.erc.precision", "higher", "auto, default, high, highest"]),
    ({"erc": ERC | {"activation": "swiglu", "normalize": True}},
     ["losses.erc.normalize", "swiglu"]),
    ({"load_balance": {"weight": 1.0, "scope": "epoch"}}, ["losses.load_balance.scope", "epoch"]),
])  # fmt: skip
def test_what_means_nothing_is_refused_at_once(losses, words, model):
    with pytest.raises(ValueError) as refusal:
        Objective(losses, model())
    assert all(word in str(refusal.value) for word in words)
    assert "\n" not in str(refusal.value)


FACTORISED = {"aoe": {"rank": 8}, "routing_free": {"rank": 8}}


@pytest.mark.parametrize("loss, routers, reason", [
    ("erc", ("aoe", "routing_free"), "couples router rows with experts"),
    ("router_orthogonality", ("xmoe", "aoe", "routing_free"),
     "one router row of the model's width for every expert"),
    ("simbal", ("xmoe", "aoe", "routing_free"),
     "one router row of the model's width for every expert"),
    ("routing_entropy", ("routing_free",), "probabilities"),
    ("path_coupling", ("routing_free",), "probabilities"),
    ("routing_variance", ("routing_free",), "probabilities"),
    ("router_z", ("routing_free",), "logits of probabilities"),
    ("competition", ("softmax", "aoe", "mpi", "sigmoid", "xmoe", "routing_free"),
     "experts that compete"),
])  # fmt: skip
def test_a_loss_is_refused_beside_every_router_that_lacks_what_it_reads(
    loss, routers, reason, model
):
    options = {
        "erc": ERC,
        "router_orthogonality": {"decoupled": False},
        "routing_variance": PAPER,
    }.get(loss, {})
    for router in ROUTERS:
        goal = model(router=router, **FACTORISED.get(router, {}))
        Objective({loss: options | {"weight": 0.0}}, goal)
        if router not in routers:
            Objective({loss: options | {"weight": 1.0}}, goal)
            continue
        with pytest.raises(ValueError) as refusal:
            Objective({loss: options | {"weight": 1.0}}, goal)
        words = f"losses.{loss}.weight", reason, repr(router), "set it to 0"
        assert all(word in str(refusal.value) for word in words)
        assert "\n" not in str(refusal.value)


def test_a_loss_weighed_by_its_value_at_step_0_begins_at_that_weight(model):
    params = random_moe()
    rng = jax.random.key(0)
    for alpha in (0.4, 1.0):
        losses = {"erc": ERC | {"weight": 2.0, "alpha": alpha, "weight_at_init": 0.3}}
        goal = Objective(losses, model())
        scales = goal.scales_at_init(params, rng)
        goal.check_scales(scales)
        # A quotient and a product.
        assert_close(goal.total(goal.of_parameters(params, rng), scales), 0.6, terms=4)


def test_a_loss_that_is_0_at_step_0_cannot_be_weighed_by_it(model):
    # alpha 1000 is kept by any rows.
    goal = Objective({"erc": ERC | {"alpha": 1000.0, "weight_at_init": 0.3}}, model())
    scales = goal.scales_at_init(random_moe(), jax.random.key(0))
    with pytest.raises(
        BadInput, match=r"losses.erc.weight_at_init: 0.3, but the loss of step 0 gives the factor 0"
    ):
        goal.check_scales(scales)


def test_only_losses_of_parameters_are_weighed_by_their_value_at_step_0(model):
    with pytest.raises(
        BadInput, match=r"losses.router_z.weight_at_init: 0.5, but the loss reads a batch"
    ):
        Objective({"router_z": {"weight": 1.0, "weight_at_init": 0.5}}, model())
