"""Logits of padded and packed sequences, and greedy continuations, against transformers' OLMoE.

`make_generations.py` wrote the files of `generations`. Where transformers is installed, the tests
also compare with the library itself.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from moe_erc import sharding
from moe_erc.evaluation.generate import Generator, Sampling
from moe_erc.model.context import packed
from moe_erc.model.transformer import Transformer
from moe_erc.training.state import Weights
from tests.tolerance import assert_close

FILES = pathlib.Path(__file__).parent / "generations"
VARIANTS = {
    "default": {},
    "norm_topk_prob": {"renormalize": True},
    "clip_qkv": {"clip_qkv": 0.5},
    "grouped_query": {"kv_heads": 2},
    "tied": {"tie_embeddings": True},
    "theta": {"rope_theta": 100.0},
}
SIZES = {
    "vocab_size": 64,
    "width": 16,
    "heads": 4,
    "kv_heads": 4,
    "expert_width": 8,
    "experts_per_token": 2,
}


class Letters:
    """A tokenizer of 64 characters, the last of which ends a text."""

    vocab_size, eos_id, identity = 64, 63, "letters"

    def encode(self, text):
        return np.array([ord(letter) - ord("0") for letter in text])

    def decode(self, ids):
        return "".join(chr(ord("0") + token) for token in ids)


def assert_transformers_is_met(config, golden):
    model = Transformer(config, sharding.make_mesh(1, 1))
    named = {
        name.removeprefix("weights/"): leaf
        for name, leaf in golden.items()
        if name.startswith("weights/")
    }
    weights = Weights(traverse_util.unflatten_dict(named, sep="/"), {})

    @jax.jit
    def logits(segments_BT):
        everything_BT = jnp.ones_like(golden["tokens"], bool)
        output = model.apply(
            {"params": weights.params}, golden["tokens"], everything_BT, {}, packed(segments_BT)
        )
        return jnp.einsum("btd,vd->btv", output.x_BTD, output.head_VD)

    segments = {
        "left": (golden["left"], golden["left"] == 1),
        "right": (golden["right"], golden["right"] == 1),
        "packed": (np.cumsum(golden["packed"] == 0, axis=1), np.full(golden["tokens"].shape, True)),
    }
    for name, (segments_BT, inside_BT) in segments.items():
        found, expected = logits(segments_BT)[inside_BT], golden[f"logits/{name}"][inside_BT]
        # Roundings: layers with five sums over widths of at most 16 each, attention over the
        # tokens, and the head.
        assert_close(
            found, expected, terms=config.layers * (5 * 16 + expected.shape[-2]) + 16, label=name
        )

    letters, ids_BT = Letters(), golden["greedy"].tolist()
    prompts = [
        letters.decode(row[inside])
        for row, inside in zip(golden["tokens"], golden["left"] == 1, strict=True)
    ]
    expected = [letters.decode(ids[: ids.index(63)] if 63 in ids else ids) for ids in ids_BT]
    assert (
        Generator(model, letters).run(weights, prompts, Sampling(new_tokens=len(ids_BT[0])))
        == expected
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_transformers_computed(model_config, variant):
    with np.load(FILES / f"{variant}.npz") as file:
        assert_transformers_is_met(model_config(**SIZES | VARIANTS[variant]), dict(file))


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_transformers_computes(model_config, variant):
    pytest.importorskip("transformers"), pytest.importorskip("torch")
    from tests.hf import make_generations

    golden = make_generations.record(make_generations.VARIANTS[variant], seed=1)
    assert_transformers_is_met(model_config(**SIZES | VARIANTS[variant]), golden)
