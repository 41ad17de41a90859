"""No random key is used twice while a state is made and steps are taken."""

import functools
import itertools

import jax
import numpy as np
import optax
import pytest

from configs import base
from moe_erc import random_keys, sharding
from moe_erc.losses.objective import Objective
from moe_erc.model.config import ModelConfig
from moe_erc.model.transformer import Transformer
from moe_erc.training.state import initializer
from moe_erc.training.step import step_gradients

LAYERS = 3


@pytest.fixture
def drawn(monkeypatch):
    """The data of every key that `jax.random.uniform` and the initializer draw from at run time."""
    found = []

    def record(key):
        jax.debug.callback(
            lambda data: found.append(tuple(np.asarray(data).tolist())), jax.random.key_data(key)
        )

    def recording(draw):
        def of(key, *arguments, **options):
            record(key)
            return draw(key, *arguments, **options)

        return of

    monkeypatch.setattr(jax.random, "uniform", recording(jax.random.uniform))
    initializer_of = ModelConfig.initializer.fget
    monkeypatch.setattr(
        ModelConfig, "initializer", property(lambda config: recording(initializer_of(config)))
    )
    return found


def test_no_two_uses_of_a_run_draw_from_the_same_key(drawn, model_config, token_batch):
    losses = base.get_config("debug").losses.to_dict()
    losses["erc"]["weight"] = losses["competition"]["weight"] = 1.0
    config = model_config(layers=LAYERS, router="competition", rate=0.5)
    model = Transformer(config, sharding.make_mesh(1, 1))
    state = jax.jit(initializer(model, optax.sgd(1.0), 0))()
    jax.effects_barrier()
    # The embedding and the head, and in every layer four matrices of attention, the router and
    # three matrices of the experts.
    assert len(drawn) == 2 + 8 * LAYERS
    gradients_of = jax.jit(step_gradients(model, Objective(losses, model), 1))
    for step in range(2):
        gradients_of(state.replace(step=np.int32(step)), token_batch(4, 16))
    jax.effects_barrier()
    # Every step draws which layers compete, and the noise of every layer.
    assert len(drawn) == 2 + 8 * LAYERS + 2 * (1 + LAYERS)
    keys = [*drawn, tuple(np.asarray(jax.random.key_data(state.rng)).tolist())]
    assert len(set(keys)) == len(keys)


def test_a_name_is_not_a_number_that_a_split_counts_to():
    rng = jax.random.key(0)
    data = jax.jit(jax.vmap(jax.random.key_data))
    names = (
        "losses.erc",
        "competing layers",
        "parameters",
        "steps",
        "losses.simbal",
        "losses.router_orthogonality",
    )
    named = [
        tuple(np.asarray(jax.random.key_data(random_keys.named(rng, name))).tolist())
        for name in names
    ]
    counted = {tuple(key) for key in np.asarray(data(jax.random.split(rng, 1024))).tolist()}
    # A fold by number equals a key of a split. Names do not.
    assert tuple(np.asarray(jax.random.key_data(jax.random.fold_in(rng, 0))).tolist()) in counted
    assert len(set(named)) == len(names) and not counted.intersection(named)
    for one, other in itertools.permutations(names, 2):
        under = functools.reduce(random_keys.named, (one, other), rng)
        assert tuple(np.asarray(jax.random.key_data(under)).tolist()) not in {*named, *counted}


def test_the_key_of_a_name_is_the_same_in_every_process():
    # SHA-256 of "steps" begins with these 32 bits.
    expected = jax.random.fold_in(jax.random.key(7), 0xB7595E2A)
    found = random_keys.named(jax.random.key(7), "steps")
    np.testing.assert_array_equal(jax.random.key_data(found), jax.random.key_data(expected))
