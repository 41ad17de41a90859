"""Names, weights and sums."""

import types

import jax
import jax.numpy as jnp
import pytest

from moe_erc.losses import objective
from moe_erc.losses.objective import Objective


def output():
    routing = types.SimpleNamespace(
        load_E=jnp.array([[0.5, 0.5]]), probability_E=jnp.array([[0.75, 0.25]]), logsumexp2=jnp.array([3.0])
    )
    return types.SimpleNamespace(x_BTD=jnp.ones((1, 1, 1)), head_VD=jnp.zeros((4, 1)), routing=routing)


ERC = {
    "weight": 1.0,
    "alpha": 1.0,
    "noise": "uniform",
    "activation": "gate",
    "normalize": False,
    "layer_reduction": "mean",
}
BATCH = {"targets_BT": jnp.zeros((1, 1), jnp.int32), "mask_BT": jnp.ones((1, 1), bool)}


def test_terms_are_unweighted_and_the_total_is_weighted():
    losses = {
        "lm": {"weight": 1.0, "chunk": 8},
        "load_balance": {"weight": 0.5, "scope": "micro_batch"},
        "router_z": {"weight": 2.0},
    }
    terms = Objective(losses).of_batch(output(), BATCH, jnp.zeros((1, 2)))
    # uniform over 4 tokens: ln 4;  2 * (0.5 * 0.75 + 0.5 * 0.25) = 1;  3
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(
        {"lm": 1.386294, "load_balance": 1.0, "router_z": 3.0}
    )
    assert Objective(losses).total(terms) == pytest.approx(1.386294 + 0.5 + 6.0)


def test_balance_over_the_step_counts_earlier_micro_batches():
    losses = {"load_balance": {"weight": 1.0, "scope": "step"}}
    # earlier load (1, 0) and ours (0.5, 0.5) average to (0.75, 0.25): 2 * (0.75 * 0.75 + 0.25 * 0.25) = 1.25
    terms = Objective(losses).of_batch(output(), BATCH, jnp.array([[1.0, 0.0]]))
    assert terms["load_balance"] == pytest.approx(1.25)


def test_a_loss_of_weight_zero_is_not_computed(monkeypatch):
    monkeypatch.setitem(objective.PARAMETER_TERMS, "erc", lambda *_: pytest.fail("computed"))
    assert Objective({"erc": ERC | {"weight": 0.0}}).of_parameters({}, jax.random.key(0)) == {}


def test_erc_reads_the_stacked_moe_parameters():
    moe = {"router": jnp.ones((2, 1, 3)), "w_gate": jnp.ones((2, 1, 3, 2))}
    terms = Objective({"erc": ERC}).of_parameters({"layers": {"moe": moe}}, jax.random.key(0))
    assert terms == {"erc": 0.0}  # one expert has no foreign pair


@pytest.mark.parametrize("losses, words", [
    ({"ercc": {"weight": 1.0}}, ["losses.ercc", "'erc'"]),
    ({"lm": {"weight": -1.0}}, ["losses.lm.weight", "-1.0"]),
    ({"lm": {"weight": float("nan")}}, ["losses.lm.weight", "nan"]),
    ({"erc": ERC | {"noise": "gauss"}}, ["losses.erc", "noise", "gauss"]),
    ({"erc": ERC | {"alpha": -0.5}}, ["losses.erc", "alpha", "-0.5"]),
    ({"erc": ERC | {"activation": "swiglu", "normalize": True}}, ["losses.erc", "normalize", "swiglu"]),
    ({"load_balance": {"weight": 1.0, "scope": "epoch"}}, ["losses.load_balance", "scope", "epoch"]),
])  # fmt: skip
def test_what_means_nothing_is_refused_at_once(losses, words):
    with pytest.raises(ValueError) as refusal:
        Objective(losses)
    assert all(word in str(refusal.value) for word in words)
    assert "\n" not in str(refusal.value)
