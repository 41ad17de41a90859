"""One function builds what a configuration says of training."""

import jax
import numpy as np
import optax
import pytest

from configs import erc, loss_free
from moe_erc import sharding
from moe_erc.training.build import build


def config_on(data, expert, module=erc):
    config = module.get_config("debug")
    config.mesh.data = data
    config.mesh.expert = expert
    return config


def test_the_mesh_lies_over_the_devices_that_are_given():
    training = build(config_on(2, -1), jax.devices()[4:8])
    assert dict(training.mesh.shape) == {"data": 2, "expert": 2}
    assert set(training.mesh.devices.flat) == set(jax.devices()[4:8])


def test_the_state_is_that_of_its_shapes():
    training = build(config_on(1, 1, loss_free))
    state = training.create_state()
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), state)
    expected = jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), training.abstract_state
    )
    assert shapes == expected
    assert state.router["bias"].shape == (2, 4)


def test_a_step_has_the_rate_of_the_schedule_and_follows_the_guard(token_batch):
    config = config_on(1, 1)
    config.guard.spike = "skip"
    training = build(config)
    assert training.guard.spike == "skip"
    batch = token_batch(config.train.batch_size, config.data.sequence_length)
    state, metrics = training.step(
        training.create_state(), sharding.put_batch(training.mesh, batch)
    )
    assert metrics["optimizer/learning_rate"] == training.schedule(0)
    assert int(state.step) == 1


def test_equal_configurations_take_the_same_step(token_batch):
    config = config_on(1, 1)
    batch = token_batch(config.train.batch_size, config.data.sequence_length)
    found = []
    for _ in range(2):
        training = build(config)
        state, _ = training.step(training.create_state(), sharding.put_batch(training.mesh, batch))
        found.append(jax.device_get(state.params))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_parameters_that_are_given_are_those_of_step_0():
    training = build(config_on(1, 1))
    given = jax.tree.map(lambda leaf: leaf + 1, training.create_state().params)
    state = training.create_state(given)
    jax.tree.map(np.testing.assert_array_equal, state.params, given)
    assert optax.tree.norm(state.opt_state[1].mu) == 0


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train.batch_size", 7, "batch_size: 7"),
        ("model.experts", 0, "model.experts: 0"),
        ("losses.erc.alpha", -1.0, "losses.erc.alpha: -1.0"),
        ("optimizer.warmup_steps", 100, "optimizer.warmup_steps: 100"),
        ("mesh.data", 3, "mesh"),
    ],
)
def test_what_cannot_be_built_is_refused(key, value, words):
    config = config_on(2, -1)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=words):
        build(config)
