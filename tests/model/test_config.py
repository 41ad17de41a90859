"""Counts against the parameters that exist, against numbers worked by hand, and against the published models."""

import jax
import jax.numpy as jnp
import pytest

from configs import base
from moe_erc.model.config import ModelConfig
from moe_erc.model.transformer import Transformer


@pytest.mark.parametrize(
    "changes", [{}, {"kv_heads": 1}, {"tie_embeddings": True}, {"experts": 8, "layers": 3}], ids=str
)
def test_parameters_are_counted_exactly(model_config, changes):
    config, tokens = model_config(**changes), jnp.zeros((1, 4), jnp.int32)
    params = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens, tokens > 0, {})
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == config.parameters()


def test_counts_by_hand(model_config):
    # D 32, F 16, E 4, K 2, L 2, V 512, two heads of width 16 sharing one key/value head
    # embeddings 2 * 512 * 32 = 32768; layer: query and output 2 * 1024, key and value 2 * 512, their norms 32 + 16,
    # router 128, experts 4 * 1536, norms 64: 3120 + 128 + 6144 + 64 = 9456; final norm 32
    assert model_config().parameters() == 32_768 + 2 * 9_456 + 32
    assert model_config().active_parameters() == 51_712 - 2 * 2 * 1536
    # a token, T = 7: projections 3072, scores and values 2 * 32 * 4, router 128, experts 2 * 1536; head 512 * 32
    assert model_config().flops_per_token(7) == 2 * (2 * (3072 + 256 + 128 + 3072) + 16384)


@pytest.mark.parametrize(
    "size, total, active", [("olmoe_1b_7b", 6.92e9, 1.28e9), ("3b", 2.99e9, 0.61e9), ("15b", 14.97e9, 0.92e9)]
)
def test_published_sizes(size, total, active):
    config = ModelConfig(**base.get_config(size).model)
    assert config.parameters() == pytest.approx(total, rel=0.002)
    assert config.active_parameters() == pytest.approx(active, rel=0.01)


@pytest.mark.parametrize("changes, words", [
    ({"experts_per_token": 5}, ["experts_per_token", "5", "4"]),
    ({"width": 33}, ["width", "33", "2"]),
    ({"width": 6, "heads": 2}, ["width", "3", "even"]),
    ({"kv_heads": 3, "heads": 2}, ["kv_heads", "2", "3"]),
    ({"layers": 0}, ["layers", "0"]),
    ({"dtype": "float16"}, ["dtype", "float16", "bfloat16"]),
    ({"remat": "all"}, ["remat", "all", "block"]),
    ({"experts_implementation": "fast"}, ["experts_implementation", "fast", "block_loop"]),
])  # fmt: skip
def test_a_model_that_cannot_be_built_is_refused(model_config, changes, words):
    with pytest.raises(ValueError) as refusal:
        model_config(**changes)
    assert all(word in str(refusal.value) for word in words)


def test_a_larger_vocabulary_than_the_models_is_refused(model_config):
    model_config().check_vocabulary(512)
    with pytest.raises(ValueError, match="513"):
        model_config().check_vocabulary(513)


def test_identity_ignores_how_the_model_is_computed(model_config):
    assert model_config(dtype="bfloat16", remat="block").identity() == model_config().identity()
    assert model_config(renormalize=True).identity() != model_config().identity()
