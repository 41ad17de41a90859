"""What each format says of its files is read token for token, and damage is named in one line."""

import dataclasses

import numpy as np
import pytest

from moe_erc.checks import BadInput
from moe_erc.data.shards.storage import ShardError
from moe_erc.data.text import documents_per_window, prepare, validation_batches

KINDS = ("flat", "numpy", "datatrove", "megatron")


def train(corpus):
    [stream] = corpus.streams["train"].values()
    return stream


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_read_in_the_order_of_the_shards(
    kind, write_shards, documents, stream, shard_config, tmp_path
):
    corpus = prepare(shard_config(write_shards(tmp_path / "shards", kind, documents)))
    found = train(corpus)
    np.testing.assert_array_equal(found.tokens_N[:], stream)
    # The slice from the last token of the first shard to the first of the third.
    np.testing.assert_array_equal(found.tokens_N[7:23], stream[7:23])
    assert len(found.tokens_N) == 47 and list(corpus.streams["train"]) == ["shards"]
    # A flat array counts documents in a sample, which is all of so small a one.
    assert found.documents == 7


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("flat", "<u4"),
        ("numpy", "<u4"),
        ("numpy", "<i8"),
        ("datatrove", "<u4"),
        ("megatron", "<i4"),
    ],
)
def test_tokens_of_four_and_more_bytes(
    kind, dtype, write_shards, documents, stream, shard_config, tmp_path
):
    options = {"dtype": "uint32"} if kind == "flat" else {}
    source = write_shards(tmp_path / "s", kind, documents, dtype=dtype)
    np.testing.assert_array_equal(
        train(prepare(shard_config(source, **options))).tokens_N[:], stream
    )


@pytest.mark.parametrize("kind", KINDS)
def test_documents_end_where_the_index_or_the_closing_token_says(
    kind, write_shards, documents, stream, shard_config, tmp_path
):
    source = write_shards(tmp_path / "s", kind, documents)
    found = train(prepare(shard_config(source)))
    np.testing.assert_array_equal(found.ends(0, stream), stream == 256)
    for start in range(len(stream)):
        window = stream[start : start + 9]
        np.testing.assert_array_equal(found.ends(start, window), window == 256)


def test_an_index_knows_ends_that_no_token_closes(write_shards, documents, shard_config, tmp_path):
    opened = [[document[:-1] for document in shard if len(document) > 1] for shard in documents]
    lengths = [len(document) for shard in opened for document in shard]
    for kind, options in (("datatrove", {}), ("megatron", {}), ("megatron", {"per_document": 2})):
        source = write_shards(tmp_path / f"{kind}{len(options)}", kind, opened, **options)
        config = dataclasses.replace(shard_config(source), attend_across_documents=False)
        found = train(prepare(config))
        ends = found.ends(0, found.tokens_N[:])
        assert (np.flatnonzero(ends) + 1).tolist() == np.cumsum(lengths).tolist()
        assert documents_per_window(prepare(config), 4) == pytest.approx(1 + 3 * 6 / sum(lengths))


def test_an_index_of_many_documents_is_searched_in_blocks(
    write_shards, shard_config, tmp_path, monkeypatch
):
    monkeypatch.setattr("moe_erc.data.shards.tokens._ENDS_PER_READ", 3)
    lengths = np.random.default_rng(1).integers(1, 5, 50)
    source = write_shards(tmp_path / "s", "datatrove", [[np.ones(n, int) for n in lengths]])
    found = train(prepare(shard_config(source)))
    expected = np.zeros(lengths.sum(), bool)
    expected[np.cumsum(lengths) - 1] = True
    for start in range(0, len(expected) - 7):
        np.testing.assert_array_equal(
            found.ends(start, np.zeros(7)), expected[start : start + 7], str(start)
        )


def test_another_closing_token(write_shards, documents, stream, shard_config, tmp_path):
    closed = [[np.where(ids == 256, 7, np.where(ids == 7, 8, ids)) for ids in shard]
              for shard in documents]  # fmt: skip
    source = write_shards(tmp_path / "s", "flat", closed)
    config = dataclasses.replace(shard_config(source), attend_across_documents=False)
    with pytest.raises(BadInput, match=r"no token 256, .* set data\.tokens\.end_of_document"):
        prepare(config)
    config = shard_config(source, end_of_document="7", validation_fraction=0.5)
    corpus = prepare(dataclasses.replace(config, attend_across_documents=False))
    assert corpus.streams["train"]["s"].documents > 0
    batch = next(validation_batches(corpus, "s", 4, 100))
    ends = batch["inputs_BT"] == 7
    np.testing.assert_array_equal(batch["segments_BT"], np.cumsum(ends, axis=1) - ends)


# (kind, what is done to the first shard, part of the message)
DAMAGE = {
    "no multiple": ("flat", lambda p: p.write_bytes(p.read_bytes()[:-1]), "15 bytes of tokens"),
    "numpy cut off": ("numpy", lambda p: p.write_bytes(p.read_bytes()[:-2]), "its header says"),
    "numpy header": (
        "numpy",
        lambda p: p.write_bytes(p.read_bytes()[:20]),
        "NumPy header that cannot be read",
    ),
    "floats": ("numpy", lambda p: np.save(p, np.zeros(3)), "float64 of shape (3,)"),
    "a matrix": ("numpy", lambda p: np.save(p, np.zeros((3, 2), "u2")), "uint16 of shape (3, 2)"),
    "datatrove cut off": (
        "datatrove",
        lambda p: p.write_bytes(p.read_bytes()[:-2]),
        "14 bytes, and its metadata says 8 tokens",
    ),
    "index no multiple": (
        "datatrove",
        lambda p: p.with_name("000.ds.index").write_bytes(bytes(23)),
        "23 bytes, which is no multiple of 8",
    ),
    "index cut off": (
        "datatrove",
        lambda p: p.with_name("000.ds.index").write_bytes(np.array([3, 4], "<u8").tobytes()),
        "holds 8 tokens, and its index says 4",
    ),
    "metadata": (
        "datatrove",
        lambda p: p.with_name("000.ds.metadata").write_text("gpt2"),
        "does not give a tokenizer",
    ),
    "no idx": ("megatron", lambda p: p.with_suffix(".idx").unlink(), "has no index"),
    "idx of another kind": (
        "megatron",
        lambda p: p.with_suffix(".idx").write_bytes(bytes(100)),
        "no index of Megatron-LM",
    ),
    "idx cut off": (
        "megatron",
        lambda p: p.with_suffix(".idx").write_bytes(p.with_suffix(".idx").read_bytes()[:-8]),
        "it is cut off",
    ),
    "bin cut off": (
        "megatron",
        lambda p: p.write_bytes(p.read_bytes()[:-2]),
        "holds 7 tokens, and its index says 8",
    ),
    "idx of floats": (
        "megatron",
        lambda p: p.with_suffix(".idx").write_bytes(
            p.with_suffix(".idx").read_bytes()[:17]
            + b"\x07"
            + p.with_suffix(".idx").read_bytes()[18:]
        ),
        "version 1 and type 7",
    ),
    "idx of other documents": (
        "megatron",
        lambda p: p.with_suffix(".idx").write_bytes(
            p.with_suffix(".idx").read_bytes()[:-8] + bytes(8)
        ),
        "do not hold its 3 sequences",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_in_one_line(damage, write_shards, documents, shard_config, tmp_path):
    kind, apply, message = DAMAGE[damage]
    source = write_shards(tmp_path / "s", kind, documents)
    prepare(shard_config(source))
    [first, *_] = sorted((tmp_path / "s").glob(source.rpartition("/")[2]))
    apply(first)
    with pytest.raises(BadInput) as error:
        prepare(shard_config(source))
    said = str(error.value)
    assert message in said and str(first.parent / "000") in said and "\n" not in said


def test_datatrove_may_leave_out_index_and_metadata(
    write_shards, documents, stream, shard_config, tmp_path
):
    source = write_shards(tmp_path / "s", "datatrove", documents)
    for path in (tmp_path / "s").glob("*.ds.*"):
        path.unlink()
    found = train(prepare(shard_config(source)))
    np.testing.assert_array_equal(found.tokens_N[:], stream)
    np.testing.assert_array_equal(found.ends(0, stream), stream == 256)


@pytest.mark.parametrize("kind", ["numpy", "datatrove", "megatron"])
def test_random_damage_never_ends_in_another_error(
    kind, write_shards, documents, shard_config, tmp_path
):
    source = write_shards(tmp_path / "s", kind, documents)
    config = dataclasses.replace(shard_config(source), attend_across_documents=False)
    paths = [path for path in (tmp_path / "s").iterdir() if path.suffix not in (".ds", ".bin")]
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        path = paths[random.integers(len(paths))]
        whole = path.read_bytes()
        data = bytearray(whole)
        for place in random.integers(len(data), size=3):
            data[place] = random.integers(256)
        path.write_bytes(data[: random.integers(len(data)) if random.random() < 0.2 else None])
        try:
            found = train(prepare(config))
            found.ends(0, found.tokens_N[:])
        except (BadInput, ShardError) as error:
            assert "\n" not in str(error)
            refused = refused + 1
        path.write_bytes(whole)
    assert refused > 10
