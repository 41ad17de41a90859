"""Sources: what a name means, how its documents are divided, and what is said of an empty one."""

import dataclasses
import gzip
import json
import os

import pytest

from moe_erc.checks import BadInput
from moe_erc.data.document import split_by_hash
from moe_erc.data.sources import open_source
from moe_erc.data.split_names import held_out_name


def write(directory, files):
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    return str(directory)


def texts(source, split=None):
    return [document.text for document in source.documents() if split in (None, document.split)]


def test_text_files_in_the_order_of_their_paths(config, tmp_path):
    lines = "".join(
        json.dumps({"text": text}) + "\n" for text in ("second", "third ☕", "half \ud800")
    )
    name = write(
        tmp_path / "My Books",
        {"a.txt": b"first \xff", "b/c.jsonl": lines + "\n", "b/d.txt": "last", "e.md": "not text"},
    )
    source = open_source(name, config)
    assert source.label == "my_books"
    assert texts(source) == [b"first \xff", b"second", "third ☕".encode(), b"half ?", b"last"]
    assert texts(source) == texts(source)


def test_documents_are_divided_by_hash(config, tmp_path):
    lines = "".join(json.dumps({"text": f"{number % 500}"}) + "\n" for number in range(1000))
    name = write(tmp_path / "text", {"a.jsonl": lines})
    source = open_source(name, dataclasses.replace(config, validation_fraction=0.2))
    train, validation = texts(source, "train"), texts(source, "validation")
    assert len(train) + len(validation) == 1000 and not set(train) & set(validation)
    assert 55 < len(set(validation)) < 145  # 100 of 500 expected, 5 standard deviations
    held_out = set(validation)
    more = open_source(name, dataclasses.replace(config, validation_fraction=0.3))
    assert held_out < set(texts(more, "validation"))


def test_nothing_is_held_out_at_fraction_zero_and_the_hash_is_pinned():
    assert split_by_hash(b"anything", 0.0) == "train"
    # sha256(b"abc") begins with ba7816bf8f01cfea. Read as little-endian, this is
    # 0xeacf018fbf1678ba / 2**64 = 0.9172...
    assert [split_by_hash(b"abc", fraction) for fraction in (0.917, 0.918)] == [
        "train",
        "validation",
    ]


@pytest.mark.parametrize("held_out", ["validation.jsonl", "valid/a.jsonl", "test.jsonl"])
def test_files_named_after_splits_are_those_splits(config, tmp_path, held_out):
    name = write(tmp_path / "text", {"train.txt": "seen", held_out: '{"text": "held out"}'})
    source = open_source(name, config)
    assert (texts(source, "train"), texts(source, "validation")) == ([b"seen"], [b"held out"])


def test_a_second_held_out_file_is_kept_out_of_training(config, tmp_path):
    name = write(
        tmp_path / "text",
        {"train/a.txt": "seen", "validation/a.txt": "held out", "test/a.txt": "for later"},
    )
    assert texts(open_source(name, config)) == [b"seen", b"held out"]


def test_identity_notices_a_changed_file_and_settings(config, tmp_path):
    directory = tmp_path / "text"
    name = write(directory, {"a.txt": "one"})
    first = open_source(name, config).identity
    assert open_source(name, config).identity == first
    write(directory, {"a.txt": "two"})
    second = open_source(name, config).identity
    write(directory, {"b.txt": "two"})
    third = open_source(name, config).identity
    fourth = open_source(name, dataclasses.replace(config, validation_fraction=0.5)).identity
    assert len({first, second, third, fourth}) == 4


def test_the_held_out_split_is_the_most_fitting():
    assert held_out_name(["train", "test", "validation"]) == "validation"
    assert held_out_name(["train", "test"]) == "test"
    assert held_out_name(["train", "extra"]) is None


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "/x/y",
            BadInput,
            "no such directory '/x/y'; give an existing directory, a TFDS name such as 'c4/en', "
            "'embedded' or 'planted'",
        ),
        ("./nothing", BadInput, "no such directory './nothing'"),
        ("~/nothing-here", BadInput, "no such directory '~/nothing-here'"),
        ("wiki40/en", ValueError, "no source is called 'wiki40/en'; the nearest is 'wiki40b'"),
        ("embeded", ValueError, "the nearest is 'embedded'"),
        ("c4/english", ValueError, "TFDS refuses 'c4/english'"),
        ("not a name!", ValueError, "'not a name!'"),
    ],
)
def test_names_that_mean_nothing(config, name, kind, message):
    with pytest.raises(kind) as error:
        open_source(name, config)
    assert (
        str(error.value).startswith("data.sources: ")
        and message in str(error.value)
        and "\n" not in str(error.value)
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.md": ""}, "no .txt or .jsonl file in"),
        (
            {"a.jsonl": '{"text": "good"}\n\n{"text": \n'},
            "a.jsonl:3 is not a JSON object with a string under 'text'",
        ),
        ({"a.jsonl": '{"body": "no such key"}'}, "a.jsonl:1 is not"),
        ({"a.jsonl": '["text"]'}, "a.jsonl:1 is not"),
        ({"a.jsonl": '{"text": 3}'}, "a.jsonl:1 is not"),
        ({"a.jsonl": b'{"text": "\xff"}'}, "a.jsonl:1 is not"),
        ({"dataset_info.json": "{"}, "holds a dataset_info.json that TFDS cannot read"),
    ],
)
def test_unusable_directories(config, tmp_path, files, message):
    name = write(tmp_path / "text", files)
    with pytest.raises(ValueError, match=r"^data\.sources: ") as error:
        texts(open_source(name, config))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.json", "a.JSON.GZ", "a.JSONL"])
def test_compressed_files_and_other_names_of_lines(config, tmp_path, name):
    text = "first ☕"
    content = text.encode() if ".txt" in name else json.dumps({"text": text}).encode() + b"\n"
    directory = write(
        tmp_path / "text",
        {name: gzip.compress(content) if name.lower().endswith("gz") else content},
    )
    assert texts(open_source(directory, config)) == [text.encode()]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.json": '[{"text": "x"}]'}, "a.json:1 is not a JSON object"),
        ({"a.json": '{\n"text": "x"}'}, "(a file holds one object a line)"),
        ({"a.jsonl.gz": b"not packed"}, "a.jsonl.gz' cannot be unpacked (Not a gzipped file"),
        (
            {"a.jsonl.gz": gzip.compress(b'{"text": "x"}\n' * 999)[:-20]},
            "a.jsonl.gz' cannot be unpacked (Compressed",
        ),
        ({"a.txt.gz": gzip.compress(b"text")[:10] + b"\xff" * 20}, "a.txt.gz' cannot be unpacked"),
    ],
)
def test_files_that_are_not_what_their_names_say(config, tmp_path, files, message):
    name = write(tmp_path / "text", files)
    with pytest.raises(BadInput, match=r"^data\.sources: ") as error:
        texts(open_source(name, config))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_identity_notices_another_text_of_the_same_size_and_date(config, tmp_path):
    name = write(tmp_path / "text", {"a.txt": "one"})
    first = open_source(name, config).identity
    date = (tmp_path / "text" / "a.txt").stat()
    write(tmp_path / "text", {"a.txt": "two"})
    os.utime(tmp_path / "text" / "a.txt", ns=(date.st_atime_ns, date.st_mtime_ns))
    assert open_source(name, config).identity != first


def test_a_long_name_of_a_directory_gives_a_short_label(config, tmp_path):
    name = write(tmp_path / ("x" * 250), {"a.txt": "one"})
    assert open_source(name, config).label == "x" * 64
