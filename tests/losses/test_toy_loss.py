"""A loss from outside the package is registered and trained with; nothing else is touched."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

from configs import base
from moe_erc import sharding
from moe_erc.checks import BadInput
from moe_erc.losses import LOSSES
from moe_erc.losses.base import Loss, Needs, NoOptions
from moe_erc.losses.objective import Objective
from moe_erc.model.transformer import Transformer
from moe_erc.training.state import abstract_state, create_state, initializer, shardings
from moe_erc.training.step import make_train_step
from tests.tolerance import assert_close

RATE = 0.1


@dataclasses.dataclass(frozen=True)
class TargetOptions:
    """target: what the scales of the last norm are drawn to."""

    target: float

    def __post_init__(self):
        if self.target < 0:
            raise BadInput(f"target is {self.target}; it must be at least 0")


def norm_distance(options, params, rng, model, shape_BT):
    """Half the squared distance of the last norm's scales from the target: a loss on parameters."""
    return jnp.sum((params["final_norm"] - options.target) ** 2) / 2


def largest_probability(options: NoOptions, layer):
    """Mean over tokens of the largest probability of a layer: a loss on single layers."""
    return jnp.mean(jnp.max(layer.scores.probabilities_BTE, axis=-1))


def hidden_size(options: NoOptions, output, batch, earlier_LE):
    """Mean square of the last hidden states: a loss on a batch."""
    return jnp.mean(jnp.square(output.x_BTD))


TOYS = {
    "norm_distance": Loss(kind="parameters", compute=norm_distance, options=TargetOptions),
    "largest_probability": Loss(
        kind="layer",
        compute=largest_probability,
        needs=Needs("has_probabilities", "reads probabilities"),
    ),
    "hidden_size": Loss(kind="batch", compute=hidden_size),
}


@pytest.fixture
def registered(monkeypatch):
    """The registry with the toys in it."""
    for name, loss in TOYS.items():
        monkeypatch.setitem(LOSSES, name, loss)


def test_toy_losses_of_every_kind_train_two_steps(registered, model_config, token_batch):
    config = base.get_config("debug")
    # The block that a config would have.
    config.losses.norm_distance = {"weight": 2.0, "target": 3.0}
    config.losses.largest_probability = {"weight": 1.0}
    config.losses.hidden_size = {"weight": 0.0}
    config.losses.lm.weight = 0.0
    config.losses.load_balance.weight = 0.0

    mesh = sharding.make_mesh(1, 1)
    model = Transformer(model_config(), mesh)
    optimizer = optax.sgd(RATE)
    initialize = initializer(model, optimizer, config.seed)
    shapes = abstract_state(initialize, model)
    state = create_state(initialize, shapes, None)
    objective = Objective(config.losses.to_dict(), model)
    step = make_train_step(model, objective, optimizer, 2, shardings(shapes))

    batch = sharding.put_batch(mesh, token_batch(8, 16))
    found = []
    for _ in range(2):
        state, metrics = step(state, batch)
        found.append(jax.device_get(metrics))

    names = {name for name in found[0] if name.startswith("loss/")}
    assert names == {"loss/norm_distance", "loss/largest_probability", "loss/total"}
    # Scales start at 1. Descent on 2 (s - 3)^2 / 2 shortens the distance by a share of 2 RATE: 2
    # becomes 1.6.
    width = state.params["final_norm"].size
    assert_close(found[0]["loss/norm_distance"], width * 2.0**2 / 2, terms=width)
    assert_close(found[1]["loss/norm_distance"], width * 1.6**2 / 2, terms=width)
    # Descent lowers the largest of four probabilities.
    assert 0.25 < found[1]["loss/largest_probability"] < found[0]["loss/largest_probability"] < 1
    for metrics in found:
        total = 2 * metrics["loss/norm_distance"] + metrics["loss/largest_probability"]
        assert_close(metrics["loss/total"], total, terms=4)


def test_an_option_of_a_toy_loss_is_checked_under_its_name(registered, model_config):
    block = {"norm_distance": {"weight": 1.0, "target": -1.0}}
    with pytest.raises(BadInput, match=r"losses\.norm_distance\.target is -1\.0"):
        Objective(block, Transformer(model_config()))


def test_a_toy_loss_is_refused_beside_a_router_that_lacks_what_it_reads(registered, model_config):
    model = Transformer(model_config(router="routing_free", rank=8))
    with pytest.raises(BadInput, match=r"losses\.largest_probability\.weight: 1\.0"):
        Objective({"largest_probability": {"weight": 1.0}}, model)


def test_a_kind_of_loss_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'token'; use one of batch, layer, parameters"):
        Loss(kind="token", compute=hidden_size)
