"""Perplexity against the model's own logits, on a corpus of known tokens."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc import sharding
from moe_erc.data.text import DataConfig, prepare
from moe_erc.evaluation.perplexity import Perplexity
from moe_erc.losses.language_model import token_losses
from moe_erc.model.transformer import Transformer
from moe_erc.training.state import init_weights
from tests.tolerance import assert_close

LENGTH = 32


@pytest.fixture(scope="module")
def corpus(text_directory, tmp_path_factory):
    return prepare(
        DataConfig((str(text_directory),), (), "bytes", "text", 0.1, LENGTH, str(tmp_path_factory.mktemp("c")))
    )


@functools.cache
def jitted_logits(model):
    def logits(weights, ids_T):
        pair_BT = jnp.stack([ids_T, ids_T])  # two devices want two rows
        output = model.apply({"params": weights.params}, pair_BT, jnp.ones_like(pair_BT, bool), weights.router)
        return output.x_BTD[0] @ output.head_VD.T

    return jax.jit(logits)


def logits_of(model, weights, ids):
    """Logits of a sequence of at most LENGTH tokens, padded to one shape: the model is causal."""
    padded = np.zeros(LENGTH, np.int32)
    padded[: len(ids)] = ids
    return jitted_logits(model)(weights, padded)[: len(ids)]


@pytest.fixture(scope="module")
def model_and_weights(model_config):
    model = Transformer(model_config(init_std=0.3), sharding.make_mesh(2, 1))
    return model, jax.jit(functools.partial(init_weights, model))(jax.random.key(0))


def test_loss_is_the_mean_over_every_validation_token(corpus, model_and_weights):
    model, weights = model_and_weights
    put = functools.partial(sharding.put_whole_batch, model.mesh)
    losses = functools.partial(token_losses, chunk=16)
    found = Perplexity(model, corpus, losses, put, (4, LENGTH)).run(weights)
    (domain, stream), = corpus.streams["validation"].items()  # fmt: skip
    tokens_N, total = np.asarray(stream.tokens_N, np.int32), 0.0
    for start in range(0, len(tokens_N) - 1, LENGTH):  # the last window is shorter
        window = tokens_N[start : start + LENGTH + 1]
        log_probs = jax.nn.log_softmax(logits_of(model, weights, window[:-1]))
        total -= float(log_probs[np.arange(len(window) - 1), window[1:]].sum())
    assert found[f"validation_tokens/{domain}"] == len(tokens_N) - 1
    # losses of one sign, each known to two layers of five sums over at most 32, and the head; batches of 4 * 32 tokens
    terms = 2 * 5 * 32 + 32 + 4 * LENGTH
    assert_close(np.float32(found[f"validation/{domain}"]), total / (len(tokens_N) - 1), terms)
    assert_close(np.float32(found[f"bits_per_byte/{domain}"]), total / math.log(2) / stream.bytes, terms)
    assert_close(found["router/load"].sum(axis=1), 1, terms=8)
