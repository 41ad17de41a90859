"""Counts of experts met, against the tokens of a known corpus and the load that the validation loss sees."""

import functools

import jax
import numpy as np
import pytest

from moe_erc import sharding
from moe_erc.data.text import DataConfig, prepare
from moe_erc.evaluation.expert_use import ExpertUse
from moe_erc.evaluation.perplexity import Perplexity
from moe_erc.losses.language_model import token_losses
from moe_erc.model.transformer import Transformer
from moe_erc.training.state import init_weights
from tests.tolerance import assert_close

SHAPE = (4, 32)


@pytest.fixture(scope="module")
def corpus(text_directory, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return prepare(DataConfig((str(text_directory),), (), "bytes", "text", 0.1, SHAPE[1], cache))


@pytest.mark.parametrize("changes", [{}, {"top_p": 0.4}])
def test_every_token_counts_once_at_each_of_its_experts(changes, corpus, model_config):
    model = Transformer(model_config(init_std=0.3, experts_per_token=3, **changes), sharding.make_mesh(2, 1))
    weights, put = (
        jax.jit(functools.partial(init_weights, model))(jax.random.key(0)),
        functools.partial(sharding.put_whole_batch, model.mesh),
    )
    use = ExpertUse(model, corpus, put, SHAPE).count(weights)
    [stream] = corpus.streams["validation"].values()
    seen_V = np.bincount(np.asarray(stream.tokens_N[:-1], int), minlength=model.config.vocab_size)
    np.testing.assert_array_equal(use["occurrences_V"], seen_V)
    of_token_LV, of_expert_LE = use["counts_LVE"].sum(axis=2), use["counts_LVE"].sum(axis=1)
    np.testing.assert_array_equal(np.diagonal(use["pairs_LEE"], axis1=1, axis2=2), of_expert_LE)
    np.testing.assert_array_equal(use["pairs_LEE"], use["pairs_LEE"].swapaxes(1, 2))
    if changes:  # between one expert and three
        assert (of_token_LV >= seen_V).all() and of_token_LV.sum() < 2 * 3 * seen_V.sum()
    else:  # each of three experts, beside the two others and itself
        np.testing.assert_array_equal(of_token_LV, np.stack([3 * seen_V] * 2))
        np.testing.assert_array_equal(use["pairs_LEE"].sum(axis=2), 3 * of_expert_LE)
    perplexity = Perplexity(model, corpus, functools.partial(token_losses, chunk=16), put, SHAPE)
    load_LE = perplexity.run(weights)["router/load"]
    assert_close(use["load_GLE"][0], of_expert_LE / of_expert_LE.sum(axis=1, keepdims=True), terms=4)
    np.testing.assert_array_equal(use["load_GLE"][0], load_LE)  # counts of assignments, divided once
