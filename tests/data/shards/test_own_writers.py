"""Shards of the field's own writers are read as the field's own readers read them: `make.py`."""

import dataclasses
import json

import numpy as np
import pytest

from moe_erc.data.shards.options import TokenOptions
from moe_erc.data.text import prepare
from tests import script

HERE = script.ROOT / "tests" / "data" / "shards"
EXPECTED = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))
SUFFIXES = {"datatrove_ds": "ds", "megatron": "bin", "olmo_npy": "npy"}


def assert_as_their_reader(corpus, folder):
    """The stream has the ids of all shards, and documents end where their reader sees them end."""
    [stream] = corpus.streams["train"].values()
    ids = []
    ends = []
    for _, shard in sorted(EXPECTED[folder].items()):
        ends += [len(ids) + end for end in shard["document_ends"]]
        ids += shard["tokens"]
    found = stream.tokens_N[:]
    assert found.tolist() == ids
    assert (np.flatnonzero(stream.ends(0, found)) + 1).tolist() == ends
    assert stream.documents == len(ends)


@pytest.mark.parametrize("folder", SUFFIXES)
def test_shards_of_real_text(folder, config, monkeypatch):
    # The metadata of datatrove name the tokenizer by a path from the root of the repository.
    monkeypatch.chdir(script.ROOT)
    config = dataclasses.replace(
        config,
        sources=(f"tokens:{HERE}/{folder}/*.{SUFFIXES[folder]}",),
        tokenizer=str(HERE / "tokenizer.json"),
        validation_fraction=0.0,
        attend_across_documents=False,
    )
    assert_as_their_reader(prepare(config), folder)


@pytest.mark.parametrize("folder", SUFFIXES)
def test_ids_of_four_bytes(folder, config, monkeypatch):
    monkeypatch.setattr("moe_erc.data.tokenizer.ByteTokenizer.vocab_size", 100_278)
    monkeypatch.setattr("moe_erc.data.tokenizer.ByteTokenizer.eos_id", 100_257)
    config = dataclasses.replace(
        config,
        sources=(f"tokens:{HERE}/{folder}_wide/*.{SUFFIXES[folder]}",),
        validation_fraction=0.0,
        attend_across_documents=False,
        tokens=TokenOptions(tokenizer="allenai/dolma2-tokenizer"),
    )
    assert_as_their_reader(prepare(config), f"{folder}_wide")
