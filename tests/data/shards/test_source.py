"""A pattern of shards: what it finds, what it refuses, and what is held out."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from moe_erc import resume
from moe_erc.checks import BadInput
from moe_erc.data import origin
from moe_erc.data.shards.group import absolute
from moe_erc.data.shards.options import TokenOptions
from moe_erc.data.sources import open_source
from moe_erc.data.text import describe, prepare, reopen, train_batches, validation_batches

T = 4


@pytest.fixture
def source(write_shards, documents, tmp_path):
    return write_shards(tmp_path / "mix", "datatrove", documents)


def refusal(config):
    with pytest.raises(BadInput) as error:
        prepare(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_pattern_that_finds_nothing(shard_config, source, tmp_path):
    said = refusal(shard_config(f"tokens:{tmp_path}/mix/*.npy"))
    assert said.startswith("data.sources: no token shard matches") and ".npy, .ds, .bin" in said
    said = refusal(shard_config(f"tokens:{tmp_path}/mix"))
    assert f"'tokens:{tmp_path}/mix/*.npy' for those of a directory" in said
    (tmp_path / "mix" / "notes.txt").write_text("x")
    assert "(it finds 1 '.txt' files)" in refusal(shard_config(f"tokens:{tmp_path}/mix/n*"))


def test_other_files_are_counted_and_those_of_the_format_are_not(shard_config, source, tmp_path):
    (tmp_path / "mix" / "notes.txt").write_text("x")
    corpus = prepare(shard_config(f"tokens:{tmp_path}/mix/*"))
    [account] = corpus.accounts.values()
    assert account.ignored == {"'.txt' files": 1}
    assert account.splits == "3 datatrove shards of uint16: the last 0 % of each are held out"


def test_one_file_without_a_pattern(shard_config, source, stream, tmp_path):
    corpus = prepare(shard_config(f"tokens:{tmp_path}/mix/001.ds"))
    np.testing.assert_array_equal(corpus.streams["train"]["001"].tokens_N[:], stream[8:22])


def test_files_of_several_formats(shard_config, write_shards, documents, tmp_path):
    write_shards(tmp_path / "mix", "flat", documents)
    write_shards(tmp_path / "mix", "megatron", documents)
    assert "several formats, .bin, .npy" in refusal(shard_config(f"tokens:{tmp_path}/mix/*"))


def test_mixed_token_sizes(shard_config, write_shards, documents, tmp_path):
    source = write_shards(tmp_path / "mix", "numpy", documents)
    np.save(tmp_path / "mix" / "003.npy", np.zeros(9, "<u4"))
    said = refusal(shard_config(source))
    assert "000.npy' are uint16, those of" in said and "003.npy' uint32" in said


def test_the_configuration_cannot_contradict_the_format(shard_config, source):
    said = refusal(shard_config(source, dtype="uint32"))
    assert said.startswith("data.tokens.dtype: 'uint32', but") and "says uint16" in said


def test_ids_that_the_tokenizer_does_not_have(shard_config, write_shards, tmp_path):
    source = write_shards(tmp_path / "s", "numpy", [[np.arange(250, 260)]])
    said = refusal(shard_config(source))
    assert "token 7 is id 257; the tokenizer has the ids 0 to 256" in said
    assert "data.tokenizer" in said


def test_a_signed_id_below_zero(shard_config, write_shards, tmp_path):
    source = write_shards(tmp_path / "s", "megatron", [[np.array([1, -2, 3, 4, 5])]], dtype="<i4")
    assert "token 1 is id -2" in refusal(shard_config(source))


def test_uint32_that_is_read_as_uint16_and_the_reverse(
    shard_config, write_shards, documents, tmp_path
):
    wide = write_shards(tmp_path / "wide", "flat", documents, dtype="<u4")
    assert "every second token" in refusal(shard_config(wide))
    prepare(shard_config(wide, dtype="uint32"))
    narrow = write_shards(tmp_path / "narrow", "flat", [[np.arange(8)]])
    assert "data.tokens.dtype" in refusal(shard_config(narrow, dtype="uint32"))


def test_another_tokenizer_than_that_of_the_shards(shard_config, write_shards, documents, tmp_path):
    source = write_shards(tmp_path / "s", "datatrove", documents, tokenizer="gpt2")
    said = refusal(shard_config(source))
    assert said.startswith("data.tokenizer: ") and "'gpt2'" in said and "'bytes'" in said
    prepare(shard_config(source, tokenizer="gpt2"))
    assert "'gpt2'" in refusal(shard_config(source, tokenizer="gpt"))


def test_the_file_that_the_shards_name_is_compared(
    shard_config, write_shards, documents, tmp_path, monkeypatch
):
    named = tmp_path / "tokenizer.json"
    named.write_text("{}")
    source = write_shards(tmp_path / "s", "datatrove", documents, tokenizer=str(named))
    assert "data.tokenizer: " in refusal(shard_config(source))
    same = dataclasses.make_dataclass("Same", ["identity"])("bytes")
    monkeypatch.setattr("moe_erc.data.shards.group.load_tokenizer", lambda path: same)
    prepare(shard_config(source))


def test_options_of_the_wrong_form(config):
    for options, message in (
        ({"dtype": "uint8"}, "data.tokens.dtype: 'uint8' is not one of"),
        ({"end_of_document": "<eos>"}, "data.tokens.end_of_document: '<eos>' is no token id"),
        ({"validation": "a"}, "data.tokens.validation: 'a' is not a list"),
        ({"validation": ("tokens:a",)}, "data.tokens.validation: 'tokens:a' is no pattern"),
    ):
        with pytest.raises(BadInput, match="^" + message):
            TokenOptions(**options)
    with pytest.raises(BadInput, match=r"^data\.tokens\.validation: .* no source is any"):
        dataclasses.replace(config, tokens={"validation": ("a",)})


def test_a_scheme_that_cannot_be_read_and_a_package_that_is_missing(shard_config, monkeypatch):
    assert "shards are read from local paths" in refusal(shard_config("tokens:https://x/*.npy"))

    def missing(scheme):
        raise ImportError(scheme)

    monkeypatch.setattr("fsspec.filesystem", missing)
    assert "pip install 'moe_erc[s3]'" in refusal(shard_config("tokens:s3://bucket/*.npy"))


def test_shards_are_no_text(shard_config, source):
    with pytest.raises(BadInput, match="is tokens already"):
        open_source(source, shard_config(source))


def test_more_windows_than_can_be_shuffled_are_refused(shard_config, tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        file.truncate(2 * (2**33 + 1))
    source = f"tokens:{tmp_path}/a.npy"
    prepare(dataclasses.replace(shard_config(source), sequence_length=2))
    config = dataclasses.replace(shard_config(source), sequence_length=1)
    assert "8,589,934,592 windows, and 4,294,967,296 can be shuffled" in refusal(config)


def held_out(corpus):
    """{(split, domain): tokens}"""
    found = {}
    for split, streams in corpus.streams.items():
        for domain, stream in streams.items():
            found[split, domain] = stream.tokens_N[:].tolist()
    return found


def test_the_end_of_every_shard_is_held_out(shard_config, source, documents):
    corpus = prepare(shard_config(source, validation_fraction=0.25))
    shards = [np.concatenate(shard).tolist() for shard in documents]
    train = [ids[: len(ids) - len(ids) // 4] for ids in shards]
    tails = [ids[len(ids) - len(ids) // 4 :] for ids in shards]
    assert held_out(corpus) == {
        ("train", "mix"): list(itertools.chain(*train)),
        ("validation", "mix"): list(itertools.chain(*tails)),
    }
    assert "the last 25 % of each are held out" in corpus.accounts[source].splits
    # Every token of the shards is in one split, so that no window of one overlaps one of the other.
    assert sum(map(len, train + tails)) == 47


def test_shards_that_are_held_out_by_name(shard_config, source, documents, write_shards, tmp_path):
    write_shards(tmp_path / "val" / "c4", "flat", [[np.arange(5)]])
    named = (f"{tmp_path}/mix/001.ds", f"{tmp_path}/val/c4/*.npy", f"{tmp_path}/mix/*2.ds")
    corpus = prepare(shard_config(source, validation=named, validation_fraction=0.25))
    first, second, third = (np.concatenate(shard).tolist() for shard in documents)
    assert held_out(corpus) == {
        ("train", "mix"): first,
        ("validation", "001"): second,
        ("validation", "c4"): [0, 1, 2, 3, 4],
        ("validation", "mix"): third,
    }
    assert corpus.accounts[source].splits == (
        "3 datatrove shards of uint16: what data.tokens.validation names is held out, 2 of these"
    )


def test_held_out_shards_belong_to_the_source_of_their_directory(
    shard_config, write_shards, documents, tmp_path
):
    patterns = {}
    for name in ("c4", "books"):
        for split in ("train", "validation"):
            where = tmp_path / name / split
            patterns[name, split] = write_shards(where, "flat", documents)
    sources = [patterns[name, "train"] for name in ("c4", "books")]
    named = [patterns[name, "validation"].removeprefix("tokens:") for name in ("books", "c4")]
    corpus = prepare(shard_config(*sources, validation=tuple(named)))
    for split in ("train", "validation"):
        found = {domain: stream.source for domain, stream in corpus.streams[split].items()}
        assert found == {"c4": sources[0], "books": sources[1]}


def test_text_and_shards_in_one_run(shard_config, source, two_documents, stream):
    config = shard_config(source, two_documents)
    corpus = prepare(dataclasses.replace(config, weights=(3, 1), validation_fraction=0.25))
    assert list(corpus.streams["train"]) == ["mix", "two"]
    batches = train_batches(corpus, T, 4, seed=0)
    abcde = [97, 98, 99, 100, 101]
    for _ in range(5):
        inputs = next(batches)["inputs_BT"]
        assert sum(row.tolist() == abcde[:4] for row in inputs) == 1
    lines = list(describe(corpus, T, 8))
    assert lines[0].startswith(f"data {source!r}: train ") and len(lines) == 4


def test_a_run_goes_on_with_the_same_shards_alone(shard_config, source, tmp_path, monkeypatch):
    config = shard_config(source, validation_fraction=0.25)
    corpus = prepare(config)
    meta = {
        "config": {"data": json.loads(json.dumps(dataclasses.asdict(config))),
                   "train": {"batch_size": 8}},
        "data": json.loads(json.dumps(corpus.record)),
    }  # fmt: skip
    earlier = resume.read(meta, 3)
    found, changes = resume.open_text(earlier, config)
    assert found.identity == corpus.identity and not changes
    assert reopen(earlier.data, config) is not None
    # A copy elsewhere is the same text under another name.
    (tmp_path / "copy").mkdir()
    (tmp_path / "mix").rename(tmp_path / "copy" / "mix")
    moved = dataclasses.replace(config, sources=(f"tokens:{tmp_path}/copy/mix/*.ds",))
    assert resume.open_text(earlier, moved)[0].identity == corpus.identity
    (tmp_path / "copy" / "mix").rename(tmp_path / "mix")
    for path in (tmp_path / "mix").glob("002*"):
        path.unlink()
    with pytest.raises(resume.TextGone, match=r"have changed .*1 file removed \(002\.ds\)"):
        resume.open_text(earlier, config)


def test_other_tokens_in_a_file_of_the_same_size_are_noticed(shard_config, source, tmp_path):
    config = shard_config(source)
    before = prepare(config)
    path = tmp_path / "mix" / "002.ds"
    data = np.fromfile(path, "<u2")
    data[3] ^= 1
    data.tofile(path)
    assert prepare(config).identity != before.identity
    assert reopen(before.record, config) is None
    assert origin.compare(source, before.record["sources"][0]["origin"]) == ""


def test_a_relative_pattern_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("tokens:a/*.npy") == f"tokens:{tmp_path}/a/*.npy"
    assert absolute("tokens:gs://b/*.npy") == "tokens:gs://b/*.npy"
    assert absolute("c4/en") == "c4/en"


def test_validation_reads_every_held_out_target_once(shard_config, source):
    corpus = prepare(shard_config(source, validation_fraction=0.5))
    tokens = corpus.streams["validation"]["mix"].tokens_N[:]
    seen = []
    for batch in validation_batches(corpus, "mix", T, 3):
        seen += batch["targets_BT"][batch["mask_BT"]].tolist()
    assert seen == tokens[1:].tolist()
