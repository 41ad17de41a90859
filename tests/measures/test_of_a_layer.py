"""Measures of what one layer observes, worked by hand, and the models that have them."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import routing_free, vanilla
from moe_erc import sharding
from moe_erc.diagnosis.in_training import Diagnosis
from moe_erc.measures.dropped_tokens import DROPPED_TOKENS
from moe_erc.measures.probability_entropy import PROBABILITY_ENTROPY
from moe_erc.measures.registry import MEASURES, curves, find, reading
from moe_erc.model.config import ModelConfig
from moe_erc.model.transformer import Transformer
from moe_erc.training.state import init_weights
from tests.tolerance import assert_close

MASK_BT = jnp.array([[True, True, True, False]])


def observed(probabilities_BTE=None, chosen_BTK=None):
    """What these measures read of an `Observation`."""
    scores = types.SimpleNamespace(probabilities_BTE=probabilities_BTE)
    return types.SimpleNamespace(scores=scores, mask_BT=MASK_BT, chosen_BTK=chosen_BTK)


def test_entropy_of_router_probabilities():
    # 1 of log 4: even; log 2 / log 4; certain; the masked token counts nowhere: (1 + 1/2 + 0) / 3
    probabilities_BTE = jnp.array([[[0.25] * 4, [0.5, 0, 0.5, 0], [0, 0, 1, 0], [0.25] * 4]])
    assert_close(PROBABILITY_ENTROPY.compute(observed(probabilities_BTE)), 0.5, terms=16)
    assert PROBABILITY_ENTROPY.compute(observed(jnp.ones((1, 4, 1)))) == 0


def test_tokens_without_an_expert():
    # the second token has one expert, the third none; the masked one counts nowhere
    chosen_BTK = jnp.array([[[True, True], [False, True], [False, False], [False, False]]])
    assert_close(DROPPED_TOKENS.compute(observed(chosen_BTK=chosen_BTK)), 1 / 3, terms=4)


@pytest.mark.parametrize("method, key", [
    (vanilla, "router/probability_entropy"),
    (routing_free, "router/dropped_tokens"),
])  # fmt: skip
def test_a_router_has_the_one_or_the_other(method, key):
    """Measured of a model at its start: by layer, and nothing of the other."""
    model = Transformer(ModelConfig.of(method.get_config("debug")), sharding.make_mesh(1, 1))
    probe = {"inputs_BT": jnp.arange(32).reshape(2, 16), "mask_BT": jnp.ones((2, 16), bool)}
    found = Diagnosis(model, probe).run(init_weights(model, jax.random.key(0)))
    of_layers = {measure.key for measure in reading("layer")}
    assert found.keys() & of_layers == {"experts/output_cosine", key}
    assert found[key].shape == (2,) and (found[key] >= 0).all() and (found[key] <= 1).all()


def test_a_family_has_members_and_an_unknown_key_has_none():
    assert find("validation/prose").label == "validation loss, prose"
    assert find("loss/lm") is MEASURES["loss/lm"] and find("loss/erc").key == "loss/erc"
    assert find("nothing/of_this") is None


def test_metrics_are_numbers_and_vectors_by_layer():
    found = {"a": 1.5, "b": np.ones(2), "c": np.ones((2, 4)), "d": "a text"}
    assert curves(found).keys() == {"a", "b"}
