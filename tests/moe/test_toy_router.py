"""A router from outside the package is registered, configured, placed and trained.

Nothing else is touched.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from configs import base
from moe_erc import sharding
from moe_erc.checks import within
from moe_erc.losses.objective import Objective
from moe_erc.model.config import ModelConfig
from moe_erc.model.transformer import Transformer
from moe_erc.moe.routers import ROUTERS
from moe_erc.moe.routers.base import Parameter, RouterState, TopK
from moe_erc.moe.routing import Scores
from moe_erc.training.build import build

STEPS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distance(TopK):
    """Routes to the nearest experts: logits = -sharpness |x @ center_map - center|^2.

    The sharpness grows by `growth` with every step.
    """

    name: ClassVar[str] = "distance"
    sharpness: float = within(above=0, default=1.0)
    growth: float = 0.5

    def parameters(self, config):
        return {
            "center_map": Parameter(config.initializer, (config.width, 4), P("data", None)),
            "center": Parameter(config.initializer, (config.experts, 4), orthogonalized=False),
        }

    def score(self, config, mesh, parameters, x_BTD):
        low_BT1d = (x_BTD.astype(jnp.float32) @ parameters["center_map"])[:, :, None]
        logits_BTE = -self.sharpness * jnp.sum((low_BT1d - parameters["center"]) ** 2, axis=-1)
        probabilities_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        return Scores(logits_BTE, probabilities_BTE, probabilities_BTE)

    def preference(self, scores, state):
        return scores.probabilities_BTE * (1 + state["age"])

    def flops(self, config):
        return 2 * 4 * (config.width + config.experts)

    def init_state(self, config):
        return RouterState({"age": jnp.zeros(config.layers)}, {"load_balance": jnp.float32(1)})

    def after_step(self, config, state, counts):
        scale = state.loss_scales["load_balance"] * (1 + self.growth)
        return RouterState({"age": state.by_layer["age"] + 1}, {"load_balance": scale})


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setitem(ROUTERS, "distance", Distance)
    config = base.get_config("debug")
    config.model.router = "distance"
    config.routers.distance = ConfigDict({"renormalize": True, "sharpness": 2.0})
    return config


def test_a_router_from_outside_takes_two_steps(config, token_batch):
    config.optimizer.name = "muon"
    config.mesh.data = 2
    config.mesh.expert = 2
    training = build(config)
    model = training.model
    assert model.config.router == Distance(renormalize=True, sharpness=2.0)
    placed = training.abstract_state.params["layers"]["moe"]["center_map"].sharding
    assert placed.spec == P(None, "data", None)
    state = training.create_state()
    before = jax.device_get(state.params)
    assert sum(leaf.size for leaf in jax.tree.leaves(before)) == model.config.parameters()

    batch = sharding.put_batch(model.mesh, token_batch(8, 16))
    losses = []
    for _ in range(STEPS):
        state, metrics = training.step(state, batch)
        losses.append(float(metrics["loss/lm"]))
    assert losses[1] < losses[0]
    moved = jax.tree.map(
        lambda old, new: bool((old != new).any()), before, jax.device_get(state.params)
    )
    assert all(jax.tree.leaves(moved)), moved
    np.testing.assert_array_equal(state.router["age"], [STEPS, STEPS])
    assert state.loss_scales["load_balance"] == 1.5**STEPS == metrics["scale/load_balance"]


def test_what_it_cannot_do_is_refused_by_what_it_says_of_itself(config):
    with pytest.raises(ValueError, match=r"^routers\.distance\.sharpness: -1\.0 must be positive$"):
        Distance(sharpness=-1.0)
    model = Transformer(ModelConfig.of(config))
    with pytest.raises(ValueError, match=r"^losses\.erc\.weight: .*'distance'"):
        Objective({"erc": config.losses.erc.to_dict() | {"weight": 1.0}}, model)
    with pytest.raises(ValueError, match=r"'distance' cannot be exported"):
        model.config.router.exports_as()
    assert model.router_rows({}) is None


def test_without_a_block_of_options_it_has_its_defaults(config):
    del config.routers["distance"]
    assert ModelConfig.of(config).router == Distance()
