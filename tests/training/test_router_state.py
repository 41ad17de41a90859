"""What routing carries from step to step: its rules by hand, real steps, and exact restoring."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from moe_erc import sharding
from moe_erc.checks import BadInput
from moe_erc.losses.objective import Objective
from moe_erc.model.transformer import Transformer
from moe_erc.moe.routers.base import RouterState
from moe_erc.moe.routers.routing_free import sign_of_sum
from moe_erc.moe.routers.softmax import Softmax
from moe_erc.moe.routing import StepCounts
from moe_erc.training.checkpoint import Checkpoints
from moe_erc.training.state import (
    Weights,
    abstract_state,
    create_state,
    init_weights,
    initializer,
    shardings,
)
from moe_erc.training.step import make_train_step
from tests.tolerance import assert_close

RATE = 0.25
CHANGES = {
    "loss_free": {"bias_rate": RATE},
    "competition": {"router": "competition", "rate": 0.9},
    "routing_free": {"router": "routing_free", "rank": 8},
}


@pytest.fixture(scope="module")
def trainer(model_config):
    """Makes (model, fresh state, its abstract state, step function) under Adam.

    Each kind is compiled once.
    """

    @functools.cache
    def compiled(name, micro_batches):
        losses = base.get_config("debug").losses.to_dict()
        losses["competition"] |= {"weight": 0.1 if name == "competition" else 0.0}
        mesh, optimizer = sharding.make_mesh(1, 1), optax.adam(1e-2)
        model = Transformer(model_config(init_std=0.3, **CHANGES[name]), mesh)
        init = initializer(model, optimizer, 0)
        shapes = abstract_state(init, model)
        step = make_train_step(
            model, Objective(losses, model), optimizer, micro_batches, shardings(shapes)
        )
        return model, jax.device_get(bits(create_state(init, shapes))), shapes, step

    def make(name, micro_batches=2):
        model, start, shapes, step = compiled(name, micro_batches)
        start = jax.device_put(
            start.replace(rng=jax.random.wrap_key_data(start.rng)), shardings(shapes)
        )
        return model, start, shapes, step

    return make


def bits(state):
    """The state with its key as integers."""
    return state.replace(rng=jax.random.key_data(state.rng))


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(bits(state)) for state in (a, b)))


def take(step, state, batches):
    """(state, metrics of every step)."""
    history = []
    for batch in batches:
        state, metrics = step(state, batch)
        history.append(jax.device_get(metrics))
    return state, history


def batches(token_batch, count):
    """Different batches of the same shape."""
    batch = token_batch(4, 16)
    return [
        batch | {"inputs_BT": (batch["inputs_BT"] + 17 * number) % 512} for number in range(count)
    ]


def test_a_bias_moves_by_the_sign_of_the_load_of_the_whole_step(trainer, token_batch):
    model, state, _, step = trainer("loss_free")
    np.testing.assert_array_equal(state.router["bias"], np.zeros((2, 4)))
    assert state.loss_scales == {}
    # One of two micro-batches has a single unmasked token. It counts as one of 33 tokens, not as
    # much as the other 32 together.
    batch = token_batch(4, 16)
    batch["mask_BT"] = np.array([[True] * 16, [True] + [False] * 15] * 2)
    batch["mask_BT"][3] = False

    @jax.jit
    def seen(weights, batch):
        output = model.apply(
            {"params": weights.params}, batch["inputs_BT"], batch["mask_BT"], weights.router
        )
        return output.routing.assignments_E

    for _ in range(2):
        halves = [jax.tree.map(lambda leaf: leaf[part::2], batch) for part in (0, 1)]  # noqa: B023
        counts_LE = np.sum([seen(state.weights, half) for half in halves], axis=0)
        assert counts_LE.sum(axis=1).tolist() == [66, 66]  # two experts each of 33 tokens
        before = np.asarray(state.router["bias"])
        state, metrics = step(state, batch)
        change_LE = np.asarray(state.router["bias"]) - before
        assert set(np.abs(change_LE).ravel()) <= {0, RATE}
        np.testing.assert_array_equal(change_LE, RATE * np.sign(66 - 4 * counts_LE))
        assert change_LE.any()
        # The measure is a quotient of integers, in float32.
        assert_close(metrics["router/max_load"], 4 * counts_LE.max(axis=-1) / 66, terms=8)


def test_a_bias_stands_still_at_equal_load():
    counts = StepCounts(jnp.array([[4, 4, 4, 4], [8, 4, 2, 2]]), jnp.int32(8))
    before = RouterState({"bias": jnp.ones((2, 4))}, {})
    after = Softmax(bias_rate=RATE).after_step(None, before, counts)
    np.testing.assert_array_equal(after.by_layer["bias"], [[1, 1, 1, 1], [0.75, 1, 1.25, 1.25]])
    assert after.loss_scales == {}


def test_the_controller_weighs_balance_more_while_too_many_experts_run(model_config):
    config = model_config(**CHANGES["routing_free"] | {"controller_rate": 0.5})  # K is 2
    start = config.router.init_state(config)
    assert start == ({}, {"load_balance": 1.0})
    # With 3 tokens, 6 assignments per layer are 2 each, 12 in both layers.
    # 18 > 12: times 1.5; 12: unchanged; 11 < 12: divided by 1.5.
    for assignments_LE, expected in (
        ([[3, 3, 0, 0], [3, 3, 3, 3]], 1.5),
        ([[3, 0, 0, 0], [3, 3, 3, 0]], 1.0),
        ([[3, 0, 0, 0], [3, 3, 2, 0]], 1 / 1.5),
    ):
        counts = StepCounts(jnp.array(assignments_LE), jnp.int32(3))
        router, found = config.router.after_step(config, start, counts)
        assert router == {} and found["load_balance"] == pytest.approx(expected)


def test_the_controller_moves_in_real_steps_and_its_scale_is_in_the_total(trainer, token_batch):
    _, state, _, step = trainer("routing_free")
    state, (first, second) = take(step, state, batches(token_batch, 2))
    directions = []
    for before, metrics in ((1.0, first), (float(first["scale/load_balance"]), second)):
        assignments = np.rint(
            60 * metrics["router/experts_per_token"]
        ).sum()  # of 60 tokens in each of two layers
        directions.append(np.sign(assignments - 2 * 2 * 60))
        assert metrics["scale/load_balance"] == pytest.approx(before * 1.02 ** directions[-1])
        total = metrics["loss/lm"] + 0.01 * before * metrics["loss/load_balance"]
        assert_close(metrics["loss/total"], total, terms=8)
    assert any(directions)
    assert state.loss_scales["load_balance"] == second["scale/load_balance"]


@pytest.mark.parametrize("layers, rate, most", [(4, 0.3, 3), (6, 0.8, 2), (3, 1.0, 3), (2, 0.0, 3)])
def test_layers_compete_with_the_probability_but_no_more_than_so_many(
    model_config, layers, rate, most
):
    changes = {"layers": layers, "rate": rate, "max_layers": most}
    config, draws = model_config(router="competition", **changes), 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    competing = jax.jit(jax.vmap(functools.partial(config.router.competing_layers, config)))(keys)
    counts = np.sum(competing, axis=1)
    assert counts.max() <= most
    # Without the limit the count is binomial. All layers have the same share, the mean of the
    # minimum of the count and `most`, over the number of layers.
    uncut = np.random.default_rng(0).binomial(layers, rate, 1_000_000)
    share = np.minimum(uncut, most).mean() / layers
    sigma = (share * (1 - share) / draws) ** 0.5
    assert np.abs(np.mean(competing, axis=0) - share).max() <= 4 * sigma  # the worst of six layers
    if most >= layers:
        assert share == pytest.approx(rate, abs=2e-3)  # a million draws: 4 times 0.5 / sqrt(1e6)
    np.testing.assert_array_equal(competing[7], config.router.competing_layers(config, keys[7]))


def test_competition_is_of_training_alone(trainer, token_batch):
    model, state, _, step = trainer("competition")
    assert set(model.config.router.before_step(model.config, state.router, state.rng)) == {
        "competing"
    }
    state, metrics = take(step, state, batches(token_batch, 2))
    assert state.router == state.weights.router == {}
    assert max(line["loss/competition"] for line in metrics) > 0  # and it did take place
    for name in ("loss_free", "routing_free"):
        model, state, _, _ = trainer(name)
        assert (
            model.config.router.before_step(model.config, state.router, state.rng) == state.router
        )


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_goes_on_where_it_was_saved_bit_for_bit(name, trainer, token_batch, tmp_path):
    model, start, shapes, step = trainer(name)
    data = batches(token_batch, 4)
    straight, history = take(step, start, data)
    half, before = take(step, trainer(name)[1], data[:2])
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, half, {})
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(shapes)
        like = abstract_state(lambda: init_weights(model, jax.random.key(1)), model)
        weights = checkpoints.restore_weights(like)
    assert_same_bits(restored, half)
    assert isinstance(weights, Weights)
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(weights), jax.device_get(half.weights)
    )
    if name == "loss_free":  # the bias is read

        @jax.jit
        def hidden(params, router):
            return model.apply(
                {"params": params}, data[0]["inputs_BT"], data[0]["mask_BT"], router
            ).x_BTD

        found = hidden(weights.params, weights.router)
        np.testing.assert_array_equal(found, hidden(half.params, half.router))
        assert (found != hidden(weights.params, {"bias": jnp.zeros((2, 4))})).any()
    resumed, after = take(step, restored, data[2:])
    assert_same_bits(resumed, straight)
    jax.tree.map(np.testing.assert_array_equal, [*before, *after], history)
    carried = {"loss_free": resumed.router, "routing_free": resumed.loss_scales}.get(
        name, {"": jnp.ones(())}
    )
    assert all(leaf.any() for leaf in jax.tree.leaves(carried))


@pytest.mark.parametrize("numbers, sign", [
    ([0, 0], 0), ([1, -1], 0), ([2**31 - 1] * 24, 1), ([-(2**31)] * 24, -1),
    ([2**31 - 1, -(2**31), 1], 0), ([2**31 - 1, 2**31 - 1, -(2**31), -(2**31), 3], 1),
    ([-1, 0], -1), ([-(2**15), 2**15 - 1], -1),
])  # fmt: skip
def test_the_sign_of_a_sum_that_an_int32_does_not_hold(numbers, sign):
    assert np.sign(sum(numbers)) == sign
    assert sign_of_sum(jnp.array(numbers, jnp.int32)) == sign


def test_more_assignments_than_are_counted_are_refused(model_config):
    # K is 2, and routing-free may run all 4 experts.
    top = model_config()
    free = model_config(**CHANGES["routing_free"])
    top.check_assignments(2**17, 2**12)  # the last that fit: 2^30 of 2^31 - 1
    for config, batch_size, most in ((top, 2**18, 262143), (free, 2**17, 131071)):
        config.check_assignments(most, 2**12)
        with pytest.raises(
            BadInput, match=rf"train.batch_size: {batch_size} .*2,147,483,648.*at most {most}$"
        ):
            config.check_assignments(batch_size, 2**12)
