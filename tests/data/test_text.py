"""Preparing text: the streams, what decides their identity, and what is said of too little text."""

import dataclasses

import numpy as np
import pytest

from moe_erc.checks import BadInput
from moe_erc.data import streams
from moe_erc.data.text import prepare, train_batches


def content(corpus):
    return {
        split: {domain: stream.tokens_N.tolist() for domain, stream in found.items()}
        for split, found in corpus.streams.items()
    }


def test_documents_end_with_the_end_of_document_token(config, two_documents):
    corpus = prepare(dataclasses.replace(config, sources=(two_documents,)))
    assert content(corpus) == {
        "train": {"two": [97, 98, 99, 100, 101, 256]},
        "validation": {"two": [0xC3, 0xA9, 256]},
    }
    stream = corpus.streams["validation"]["two"]
    assert (stream.bytes, stream.documents, stream.tokens_N.dtype.str) == (2, 1, "<u2")
    assert not stream.tokens_N.flags.writeable and isinstance(stream.tokens_N, np.memmap)


def test_large_vocabularies_take_four_bytes(config, two_documents, monkeypatch):
    monkeypatch.setattr("moe_erc.data.tokenizer.ByteTokenizer.vocab_size", 2**16 + 1)
    corpus = prepare(dataclasses.replace(config, sources=(two_documents,)))
    assert corpus.streams["train"]["two"].tokens_N.dtype.str == "<u4"
    assert content(corpus)["train"]["two"] == [97, 98, 99, 100, 101, 256]


def test_many_batches_of_documents_keep_their_order(config, text_directory, monkeypatch):
    monkeypatch.setattr(streams, "_BYTES_PER_BATCH", 20)
    corpus = prepare(
        dataclasses.replace(config, sources=(str(text_directory),), validation_fraction=0.0)
    )
    words = corpus.tokenizer.decode(corpus.streams["train"]["words"].tokens_N)
    assert words == "".join(f"word {number}" for number in range(300))


def test_embedded_domains(config, tree, monkeypatch):
    monkeypatch.setattr("moe_erc.data.sources.installed_trees", lambda: tree)
    corpus = prepare(config)
    assert set(corpus.streams["train"]) == {"ml_code", "prose"}
    assert corpus.weights == {}


def test_a_changed_file_is_noticed(config, text_directory):
    config = dataclasses.replace(config, sources=(str(text_directory),))
    first = prepare(config)
    (text_directory / "more.txt").write_text("another document")
    assert prepare(config).identity != first.identity


def test_identity_follows_content_not_place_or_time(config, text_directory):
    base = dataclasses.replace(config, sources=(str(text_directory),))
    moved = text_directory.rename(text_directory.with_name("moved"))
    with pytest.raises(BadInput):
        prepare(base)
    first = prepare(dataclasses.replace(base, sources=(str(moved),)))
    moved.rename(text_directory)
    assert (
        prepare(dataclasses.replace(base, cache_dir=base.cache_dir + "2")).identity
        == first.identity
    )


def test_identity_follows_everything_that_decides_a_batch(config, text_directory, two_documents):
    base = dataclasses.replace(config, sources=(str(text_directory), two_documents))
    variants = [
        base,
        dataclasses.replace(base, sequence_length=5),
        dataclasses.replace(base, validation_fraction=0.5),
        dataclasses.replace(base, weights=(1, 1)),
        dataclasses.replace(base, weights=(1, 2)),
        dataclasses.replace(base, sources=base.sources[::-1]),
    ]
    assert len({prepare(variant).identity for variant in variants}) == len(variants)
    assert (
        prepare(dataclasses.replace(base, weights=(0.5, 1.0))).identity
        == prepare(variants[4]).identity
    )


def test_sources_of_one_name_get_domains_of_their_own(config, tmp_path):
    for place in ("x", "y"):
        (tmp_path / place / "books").mkdir(parents=True)
        (tmp_path / place / "books" / "a.txt").write_text(f"from {place}")
    corpus = prepare(
        dataclasses.replace(
            config,
            sources=(str(tmp_path / "x/books"), str(tmp_path / "y/books")),
            validation_fraction=0.0,
        )
    )
    assert {
        domain: corpus.tokenizer.decode(stream.tokens_N)
        for domain, stream in corpus.streams["train"].items()
    } == {
        "books": "from x",
        "books_2": "from y",
    }


def test_prepared_text_gives_batches(config, text_directory):
    corpus = prepare(dataclasses.replace(config, sources=(str(text_directory),)))
    batch = next(train_batches(corpus, 16, 4, seed=0))
    assert "word" in corpus.tokenizer.decode(batch["inputs_BT"][0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        # "abcde" and the end of the document are 6 tokens: enough for T = 5, too few for T = 6.
        (
            {"sequence_length": 6},
            "two has 6 training tokens, fewer than one window of 7 (data.sequence_length 6 + 1)",
        ),
        ({"weights": (1,), "sequence_length": 6}, "two has 6 training tokens"),
    ],
)
def test_too_little_text_is_named(config, two_documents, fields, message):
    config = dataclasses.replace(config, sources=(two_documents,))
    prepare(dataclasses.replace(config, sequence_length=5))
    with pytest.raises(ValueError, match=r"^data\.sources: ") as error:
        prepare(dataclasses.replace(config, **fields))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_with_weights_every_source_must_give_a_window(config, two_documents, text_directory):
    config = dataclasses.replace(
        config, sources=(str(text_directory), two_documents), sequence_length=6
    )
    prepare(config)
    with pytest.raises(ValueError, match="two has 6 training tokens"):
        prepare(dataclasses.replace(config, weights=(1, 1)))


def test_empty_text_is_no_document(config, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(ValueError, match="empty has 0 training tokens"):
        prepare(dataclasses.replace(config, sources=(str(tmp_path / "empty"),)))
