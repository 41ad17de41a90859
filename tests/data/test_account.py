"""What a run says of its text before it begins: splits, documents, tokens, epochs, unread files."""

import dataclasses
import json
from pathlib import Path

import pytest

from moe_erc.checks import BadInput
from moe_erc.data import streams
from moe_erc.data.document import Account, Document
from moe_erc.data.sources import Source
from moe_erc.data.text import describe, prepare
from moe_erc.data.tokenizer import ByteTokenizer


def write(directory, files):
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return str(directory)


def texts(*values):
    return "".join(json.dumps({"text": value}) + "\n" for value in values)


@pytest.fixture
def divided(tmp_path):
    """Training documents of 4 and 5 bytes, a held-out one of 3, and four unread items."""
    return write(tmp_path / "set", {
        "train/a.jsonl": texts("abcd", "abcde", "", " \n"),
        "validation.jsonl": texts("abc"),
        "test.txt": "later",
        "notes.md": "",
    })  # fmt: skip


def test_documents_tokens_and_epochs_are_said(config, divided):
    corpus = prepare(dataclasses.replace(config, sources=(divided,)))
    # 4 + 1 and 5 + 1 tokens are 11, which hold 2 windows of 4 predictions.
    # 5 windows are 2.5 epochs.
    assert list(describe(corpus, 4, 5)) == [
        f"data {divided!r}: train 2 documents of 11 tokens, validation 1 documents of 4 tokens; "
        "2.5 epochs of train in this run",
        "  train is 'train/' (1 file), validation is 'validation.jsonl' (1 file); "
        "ignored: 1 '.md' files, 1 files in another held-out split, 'test.txt', "
        "2 documents without text",
    ]


def test_a_run_that_reads_the_cache_says_the_same(config, divided, monkeypatch):
    config = dataclasses.replace(config, sources=(divided,))
    first = list(describe(prepare(config), 4, 5))
    monkeypatch.setattr(streams, "write", None)
    assert list(describe(prepare(config), 4, 5)) == first


@pytest.mark.parametrize(("weights", "epochs"), [((), [2.0, 2.0]), ((3, 1), [4.5, 0.75])])
def test_epochs_of_several_sources(config, tmp_path, weights, epochs):
    # 8 bytes and an end are 2 windows of 4; 16 bytes and an end are 4 windows. Without weights, 12
    # windows read all 6 of them twice. With (3, 1), 9 windows are of the first source and 3 of the
    # second.
    names = [
        write(tmp_path / name, {"train.txt": "x" * size, "val.txt": "y"})
        for name, size in (("a", 8), ("b", 16))
    ]
    corpus = prepare(dataclasses.replace(config, sources=tuple(names), weights=weights))
    said = [
        line.split("; ")[1].split(" ")[0]
        for line in describe(corpus, 4, 12)
        if line.startswith("data ")
    ]
    assert [float(number) for number in said] == epochs


def test_what_is_divided_by_hash_says_so(config, text_directory):
    corpus = prepare(dataclasses.replace(config, sources=(str(text_directory),)))
    _, splits = describe(corpus, 4, 1)
    assert splits == (
        "  1 file, none of them named as held out: "
        "2 % of the documents are held out, by the hash of their text"
    )


@pytest.mark.parametrize("empty", ["train", "validation"])
def test_a_split_whose_documents_are_all_empty_is_refused(config, tmp_path, empty):
    other = {"train": "validation", "validation": "train"}[empty]
    name = write(
        tmp_path / "set", {f"{empty}.jsonl": texts("", " "), f"{other}.jsonl": texts("some text")}
    )
    with pytest.raises(
        BadInput, match=rf"no document with text in its {empty} split \(2 without; train is"
    ) as error:
        prepare(dataclasses.replace(config, sources=(name,)))
    assert "\n" not in str(error.value)
    assert not list((Path(config.cache_dir) / "tokens").iterdir())


def test_domains_of_any_name_have_files_of_their_own(tmp_path):
    domains = ["", "text", "Code", "CODE", "code", "a/b", "a b", "../up", "a_b", "x" * 300, "ж"]
    documents = [
        Document("train", domain, f"text of {number}".encode())
        for number, domain in enumerate(domains)
    ]
    source = Source(
        "name", "label", "identity", lambda: iter(documents), Account("one line", {}), False
    )
    streams.write(tmp_path, source, ByteTokenizer())
    found = {
        domain: bytes(stream.tokens_N[:-1].astype("u1"))
        for _, domain, stream in streams.read(tmp_path, "name")
    }
    assert found == {domain: f"text of {number}".encode() for number, domain in enumerate(domains)}
    names = [path.name.lower() for path in tmp_path.iterdir()]
    assert len(set(names)) == len(domains) + 1


@pytest.mark.parametrize("account", [
    3, {"splits": "a\nb", "ignored": {}}, {"splits": "a", "ignored": {"b\x1b[2J": 1}},
    {"splits": "a", "ignored": {"b": "1"}}, {"splits": "a"}, {"splits": "a", "ignored": []},
])  # fmt: skip
def test_an_account_that_is_none_is_refused(config, divided, account):
    config = dataclasses.replace(config, sources=(divided,))
    prepare(config)
    (index,) = Path(config.cache_dir).rglob("index.json")
    index.write_text(json.dumps(json.loads(index.read_text()) | {"account": account}))
    with pytest.raises(BadInput, match=r"index\.json' is no table of token streams"):
        prepare(config)


@pytest.mark.parametrize("spelling", ["{}/", "{}/../set", "{}-link"])
def test_one_directory_under_two_names_is_refused(config, divided, spelling):
    Path(f"{divided}-link").symlink_to(divided)
    with pytest.raises(
        BadInput, match=r"^data\.sources: '.*' is the same text as '.*set'; list it once"
    ) as error:
        prepare(dataclasses.replace(config, sources=(divided, spelling.format(divided))))
    assert "\n" not in str(error.value)
