"""Micro-batches with uneven numbers of tokens and assignments make the step of the whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from moe_erc import sharding
from moe_erc.losses.objective import Objective
from moe_erc.model.transformer import Transformer
from moe_erc.moe.routers.base import RouterState
from moe_erc.moe.routers.softmax import Softmax
from moe_erc.moe.routing import StepCounts
from moe_erc.training.state import initializer
from moe_erc.training.step import batch_gradients, split, step_gradients

ROWS, LENGTH, PARTS = 8, 16, 4
CHANGES = {
    "softmax": {},
    "top_p": {"top_p": 0.5, "experts_per_token": 4},
    "routing_free": {"router": "routing_free", "rank": 8},
    "competition": {"router": "competition", "rate": 1.0},
}
# Means over tokens in another order differ by roundings, as `tests/tolerance.py` counts them: sums
# over at most 128 tokens, and on the way to a gradient two layers of five sums over widths of at
# most 32 and attention over as many, and the head, once forward and twice backward.
WITHIN = (128 + 3 * (2 * (5 * 32 + 32) + 32)) * 2.0**-23


def test_micro_batches_weigh_by_their_assignments():
    # The 24 and 4 unmasked tokens have two experts each. Their counts add up to 7, 16, 14, 19 with
    # the mean 14. As shares of 48 and of 8, the second expert would have 16/48 and 0. Their mean
    # is 1/6, which would be less than 1/4.
    counts_MLE = jnp.array([[[4, 16, 12, 16]], [[3, 0, 2, 3]]])
    mask_MBT = np.zeros((2, 1, 24), bool)
    mask_MBT[0], mask_MBT[1, 0, :4] = True, True

    def of_batch(batch, earlier):
        counts = StepCounts(batch["counts_LE"], jnp.sum(batch["mask_BT"], dtype=jnp.int32))
        return {"w": jnp.float32(0)}, {"lm": jnp.float32(0)}, counts

    micro_batches = {"mask_BT": mask_MBT, "counts_LE": counts_MLE}
    no_counts = StepCounts(jnp.zeros((1, 4), jnp.int32), jnp.int32(0))
    _, _, counts = batch_gradients(of_batch, micro_batches, no_counts)
    np.testing.assert_array_equal(counts.assignments_LE, [[7, 16, 14, 19]])
    assert counts.tokens == 28 and counts.assignments_LE.dtype == counts.tokens.dtype == jnp.int32
    np.testing.assert_array_equal(counts.experts_per_token_L, [2])
    before = RouterState({"bias": jnp.zeros((1, 4))}, {})
    after = Softmax(bias_rate=0.5).after_step(None, before, counts)
    np.testing.assert_array_equal(after.by_layer["bias"], [[0.5, -0.5, 0, -0.5]])


@pytest.fixture(scope="module")
def uneven_batch(token_batch):
    """Micro-batches of every fourth row, with 32, 20, 4 and 0 unmasked tokens."""
    batch = token_batch(ROWS, LENGTH)
    counted = np.array([16, 16, 4, 0, 16, 4, 0, 0])
    return batch | {"mask_BT": np.arange(LENGTH) < counted[:, None]}


@pytest.fixture(scope="module")
def taker(model_config):
    """Makes (model, state, {micro-batches: gradients of a step}).

    It takes a router and {loss: changes of its options}.
    """

    @functools.cache
    def make(router, weights):
        losses = base.get_config("debug").losses.to_dict()
        for name, changes in dict(weights).items():
            losses[name] |= dict(changes)
        model = Transformer(model_config(init_std=0.3, **CHANGES[router]), sharding.make_mesh(1, 1))
        state = jax.jit(initializer(model, optax.sgd(1.0), 0))()
        objective = Objective(losses, model)
        return (
            model,
            state,
            {parts: jax.jit(step_gradients(model, objective, parts)) for parts in (1, PARTS)},
        )

    def of(router, **losses):
        return make(
            router, tuple((name, tuple(changes.items())) for name, changes in losses.items())
        )

    return of


def assert_same(expected, found, largest=None):
    def same(path, a, b):
        atol = WITHIN * (largest or float(jnp.max(jnp.abs(a))))
        np.testing.assert_allclose(b, a, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(same, expected, found)


ADDITIVE = {
    "softmax": ("router_z", "routing_entropy", "path_coupling", "output_overlap", "specialization"),
    "top_p": ("router_z", "routing_entropy", "path_coupling"),
    "routing_free": (),
    "competition": ("competition", "router_z"),
}


@pytest.mark.parametrize("router", ADDITIVE)
def test_losses_that_are_means_over_tokens_are_those_of_the_whole_batch(
    router, taker, uneven_batch
):
    losses = {name: {"weight": 0.1} for name in ADDITIVE[router]} | {
        "load_balance": {"weight": 0.0}
    }
    _, state, gradients_of = taker(router, **losses)
    whole, parts = gradients_of[1](state, uneven_batch), gradients_of[PARTS](state, uneven_batch)
    assert set(whole[1]) == {"lm", *ADDITIVE[router]}
    assert_same(whole[0], parts[0])
    for name, term in whole[1].items():  # cosines of about 0.1 cancel in their mean
        assert_same(
            term,
            parts[1][name],
            largest=max(0.1, abs(float(term))) if name == "specialization" else None,
        )
    jax.tree.map(np.testing.assert_array_equal, whole[2], parts[2])  # integers
    assert parts[2].tokens == uneven_batch["mask_BT"].sum()


@pytest.mark.parametrize("router", ["softmax", "top_p", "routing_free"])
def test_balance_over_the_step_reads_the_counts_so_far(router, taker, uneven_batch):
    losses = {"load_balance": {"weight": 10.0, "scope": "step"}, "lm": {"weight": 0.0}}
    model, state, gradients_of = taker(router, **losses)
    micro_batches = split(uneven_batch, PARTS)

    def expected(params):
        """The definition: E sum_e load mean_prob by layer.

        The load is that of this micro-batch and of those before it.
        """
        total, counts_LE = 0, 0
        for part in range(PARTS):
            batch = jax.tree.map(lambda leaf: leaf[part], micro_batches)  # noqa: B023
            routing = model.apply(
                {"params": params}, batch["inputs_BT"], batch["mask_BT"], {}
            ).routing
            counts_LE += routing.assignments_E
            load_LE = counts_LE / jnp.sum(counts_LE, axis=1, keepdims=True)
            balance = load_LE.shape[1] * jnp.mean(jnp.sum(load_LE * routing.probability_E, axis=1))
            total += balance * batch["mask_BT"].sum() / uneven_batch["mask_BT"].sum()
        return total

    balance, gradients = jax.jit(jax.value_and_grad(expected))(state.params)
    found, terms, counts = gradients_of[PARTS](state, uneven_batch)
    assert terms["load_balance"] == pytest.approx(float(balance), rel=WITHIN)
    assert_same(jax.tree.map(lambda leaf: 10 * leaf, gradients), found)
    whole = gradients_of[1](state, uneven_batch)
    jax.tree.map(np.testing.assert_array_equal, whole[2], counts)
    if router != "softmax":  # tokens have different numbers of experts
        per_token_M = [micro_batches["mask_BT"][part].sum() for part in range(PARTS)]
        assert counts.assignments_LE.sum() % sum(per_token_M) != 0


def test_a_layer_that_does_not_compete_is_no_part_of_the_loss(model_config, token_batch):
    losses = base.get_config("debug").losses.to_dict()
    losses["competition"]["weight"] = 1.0
    batch = token_batch(4, LENGTH)
    found = {}
    for rate, most in ((1.0, 2), (1.0, 1)):
        config = model_config(init_std=0.3, router="competition", rate=rate, max_layers=most)
        model = Transformer(config, sharding.make_mesh(1, 1))
        state = jax.jit(initializer(model, optax.sgd(1.0), 0))()
        goal = Objective(losses, model)
        competing = {"competing": jnp.array([True, most == 2])}

        observed = jax.jit(model.clone(observers=goal.observers).apply)
        output = observed({"params": state.params}, batch["inputs_BT"], batch["mask_BT"], competing)
        found[most] = (
            goal.of_batch(output, batch, None)["competition"],
            output.observed["competition"],
        )
    both, errors_L2 = found[2]
    assert errors_L2[:, 1].tolist() == [1, 1] and both == pytest.approx(
        float(errors_L2[:, 0].mean()), rel=1e-6
    )
    one, errors_L2 = found[1]
    assert (
        errors_L2[:, 1].tolist() == [1, 0] and one == errors_L2[0, 0] > 0
    )  # the layer that does not compete must not halve it
