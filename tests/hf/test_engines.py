"""An export is the run's model also for engines that compute with the values of the release."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_erc import sharding
from moe_erc.hf.engines import differences
from moe_erc.hf.olmoe import export_olmoe, import_olmoe
from moe_erc.hf.olmoe_config import PLAIN, model_fields
from moe_erc.hf.shards import find_tensors, read_config
from moe_erc.hf.tokenizer_files import BYTES, rows_of
from moe_erc.model.config import ModelConfig
from moe_erc.model.transformer import Transformer
from tests.hf import models
from tests.tolerance import assert_close

ROWS = rows_of(BYTES, 257, 257)
HARD_CODED = {"rms_norm_eps": 1e-5, "norm_topk_prob": False, "tie_word_embeddings": False}
IDS = np.random.default_rng(1).integers(0, 257, (2, 16), np.int32)
# Of a logit: two layers with five sums over widths of at most 32 each, attention over 16 tokens,
# the head, and a factor on each of six matrices.
TERMS = 2 * (5 * 32 + 16) + 32 + 6


@pytest.fixture(scope="module")
def trained(model_config):
    """(model, params), with parameters as large as after training."""

    def make(**changes):
        return models.trained(model_config(**changes))

    return make


def load(directory):
    """(model, params) of an export."""
    config = ModelConfig(**PLAIN | model_fields(read_config(directory)))
    model = Transformer(config, sharding.make_mesh(2, 1))
    return model, import_olmoe(directory, config, models.abstract(model))


@pytest.mark.parametrize("changes", [
    {"norm_eps": 1e-1},
    {"norm_eps": 10.0, "router": "mpi"},
    {"tie_embeddings": True, "norm_eps": 1e-2},
    {"kv_heads": 1, "norm_eps": 1e-2},
], ids=str)  # fmt: skip
def test_what_engines_hard_code_is_met_without_changing_the_model(trained, changes, tmp_path):
    model, params = trained(**changes)
    export_olmoe(tmp_path / "out", model, params, rows=ROWS, repeat_kv_heads=True)
    config = read_config(tmp_path / "out")
    assert config.items() >= HARD_CODED.items()
    assert config["num_key_value_heads"] == config["num_attention_heads"]
    assert "lm_head.weight" in find_tensors(tmp_path / "out")
    assert not differences(load(tmp_path / "out")[0].config)
    found = models.logits(*load(tmp_path / "out"), IDS)
    expected = models.logits(model, params, IDS)[..., np.asarray(ROWS)]
    assert_close(found, expected, TERMS)
    # The engine's own epsilon would make another model of the run's numbers.
    with_eps = dataclasses.replace(model.config, norm_eps=1e-5)
    engine = Transformer(with_eps, model.mesh)
    hard_coded = models.logits(engine, params, IDS)[..., np.asarray(ROWS)]
    assert np.abs(hard_coded - expected).max() > 100 * np.abs(found - expected).max()


def test_a_model_with_the_values_of_the_release_is_written_bit_by_bit(trained, tmp_path):
    model, params = trained()
    export_olmoe(tmp_path / "out", model, params)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out")[1], params)


@pytest.mark.parametrize("tied", [False, True])
def test_no_row_of_a_padded_vocabulary_is_written(trained, tied, tmp_path):
    model, params = trained(tie_embeddings=tied)
    export_olmoe(tmp_path / "out", model, params, rows=rows_of("some.json", 300, 512))
    written = find_tensors(tmp_path / "out")
    head = params["embed"] if tied else params["head"]
    np.testing.assert_array_equal(written["lm_head.weight"].map(), head[:300])
    np.testing.assert_array_equal(written["model.embed_tokens.weight"].map(), params["embed"][:300])
    assert read_config(tmp_path / "out")["vocab_size"] == 300


def test_the_token_that_llama_cpp_needs_has_a_row_that_no_text_has_trained():
    assert list(rows_of(BYTES, 257, 512)) == list(range(258))
    assert list(rows_of(BYTES, 257, 257)) == [*range(257), 255]
    assert 255 not in "".join(map(chr, range(0x800))).encode()


@pytest.mark.parametrize("changes, words", [
    ({}, []),
    ({"tie_embeddings": True, "norm_eps": 1e-2}, []),
    ({"clip_qkv": 0.5}, ["model.clip_qkv 0.5", "vLLM and llama.cpp", "do not clip"]),
    ({"renormalize": True}, ["routers.softmax.renormalize True", "vLLM and llama.cpp"]),
    ({"router": "mpi", "renormalize": True}, ["routers.mpi.renormalize True"]),
    ({"renormalize": True, "experts_per_token": 4}, []),
    ({"kv_heads": 1}, ["model.kv_heads 1 for 2 heads", "llama.cpp", "--repeat_kv_heads"]),
], ids=str)  # fmt: skip
def test_what_other_engines_do_not_compute_is_named(model_config, changes, words):
    config = model_config(**{"kv_heads": 2} | changes)
    found = [str(difference) for difference in differences(config)]
    assert len(found) == bool(words)
    assert all(word in found[0] for word in words)
