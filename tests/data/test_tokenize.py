"""Token shards from text: what datatrove writes is what a run on the same text sees."""

import bz2
import dataclasses
import gzip
import importlib.machinery
import io
import json
import sys
import types
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datatrove.data import Document as TroveDocument
from datatrove.io import get_datafolder
from datatrove.pipeline.tokens import DocumentTokenizer, MegatronDocumentTokenizer
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile
from datatrove.pipeline.tokens.merger import get_data_reader, load_doc_ends
from datatrove.pipeline.tokens.tokenizer import TokenizedFile
from warcio.warcwriter import WARCWriter

from moe_erc.checks import BadInput
from moe_erc.data import bpe, datatrove_steps, shard_plan, streams, tfds_source
from moe_erc.data import tokenizer as tokenizers
from moe_erc.data.sources import open_source
from tests.data.test_tfds_source import prepared

SHARDS = Path(__file__).with_name("shards")
TOKENIZER = SHARDS / "tokenizer.json"
END = tokenizers.END_OF_DOCUMENT[0]
TEXTS = ["one", "two words", "", "ἕν", f"it spells {END} and goes on", "  \n", "the last of them"]


def tokenised(config, output, tasks=1):
    """Runs every task in this process; {folder: the documents of its shards, task by task}."""
    folder = get_datafolder(str(output))
    tokenizer = tokenizers.load(config.tokenizer)
    parts = list(shard_plan.parts_of(config))
    datatrove_steps.check(parts, config.text_key)
    spec = config.tokenizer
    steps = datatrove_steps.pipeline(parts, folder, spec, tokenizer.identity, config.text_key)
    for rank in range(tasks):
        data = None
        for step in steps:
            data = step(data, rank, tasks)
    return {part.folder: documents(folder, part.folder) for part in parts}


def documents(folder, of_part):
    """The ids of every document, as datatrove reads its own shards."""
    found = []
    for path in folder.list_files(of_part, glob_pattern="*.ds"):
        ends = load_doc_ends(folder.open(f"{path}.index", "rb"))
        size = int(folder.open(f"{path}.metadata", "rt").read().split("\n")[0].rpartition("|")[2])
        for data in get_data_reader(folder.open(path, "rb"), ends.tolist(), nb_bytes=size):
            found.append(np.frombuffer(data, f"<u{size}").tolist())
    return found


def lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def encoded(config, texts):
    """The documents that shards should hold: those with text, each with its end."""
    tokenizer = tokenizers.load(config.tokenizer)
    kept = [text for text in texts if text.strip()]
    return [[*tokenizer.encode(text).tolist(), tokenizer.eos_id] for text in kept]


@pytest.fixture
def bpe_config(config):
    return dataclasses.replace(config, tokenizer=str(TOKENIZER), validation_fraction=0.0)


@pytest.fixture
def directory(tmp_path):
    """A directory of text, as a source."""

    def write(**files):
        for name, content in files.items():
            path = tmp_path / "text" / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path / "text")

    return write


@pytest.mark.parametrize("tokenizer", ["bytes", str(TOKENIZER)])
def test_the_shards_hold_the_tokens_that_a_run_on_the_same_text_sees(
    config, tokenizer, directory, tmp_path
):
    texts = [f"document {number} {END} \ud800 ☕" * (1 + number % 3) for number in range(60)]
    files = {"a_jsonl": lines(texts), "b_txt": b"no UTF-8: \xff\xfe", "c__d_jsonl_gz": b""}
    files["c__d_jsonl_gz"] = gzip.compress(lines(TEXTS).encode())
    name = directory(**files)
    config = dataclasses.replace(
        config, sources=(name,), tokenizer=tokenizer, validation_fraction=0.3
    )
    found = tokenised(config, tmp_path / "shards")
    (tmp_path / "cache").mkdir()
    source = open_source(name, config)
    streams.write(tmp_path / "cache", source, tokenizers.load(tokenizer))
    for split, _, stream in streams.read(tmp_path / "cache", name):
        assert np.concatenate(found[f"text/{split}"]).tolist() == stream.tokens_N.tolist()
        assert len(found[f"text/{split}"]) == stream.documents
    first = (tmp_path / "shards/text/train/00000_unshuffled.ds.metadata").read_text()
    assert first.startswith(f"{tokenizer}|2\n")


def test_text_never_makes_a_control_token_though_it_does_in_datatrove_itself(bpe_config, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text(END)
    end_id = tokenizers.load(str(TOKENIZER)).eos_id
    config = dataclasses.replace(bpe_config, sources=(str(tmp_path / "text"),))
    ((*ids, last),) = tokenised(config, tmp_path / "ours")["text/train"]
    assert ids and last == end_id and end_id not in ids
    plain = DocumentTokenizer(str(tmp_path / "theirs"), str(TOKENIZER), eos_token=END)
    plain.run([TroveDocument(END, "0")])
    assert documents(get_datafolder(str(tmp_path / "theirs")), "") == [[end_id, end_id]]


def test_a_vocabulary_beyond_two_bytes_is_written_in_four(config, directory, tmp_path):
    library = tokenizers.library()
    vocabulary = {f"w{number}": number for number in range(70_000)} | {END: 70_000}
    large = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token="w0"))
    large.pre_tokenizer = library.pre_tokenizers.Whitespace()
    bpe.save(large, tmp_path / "tokenizer.json")
    name = directory(a_txt="w69999 w1")
    config = dataclasses.replace(
        config, sources=(name,), tokenizer=str(tmp_path / "tokenizer.json"), validation_fraction=0.0
    )
    assert tokenised(config, tmp_path / "shards") == {"text/train": [[69_999, 1, 70_000]]}
    metadata = (tmp_path / "shards/text/train/00000_unshuffled.ds.metadata").read_text()
    assert metadata.split("\n")[:2] == [f"{tmp_path / 'tokenizer.json'}|4", "3"]


def test_every_kind_of_file_is_read(bpe_config, directory, tmp_path, monkeypatch):
    # It needs a library of the system, and guesses the types that these records state.
    magic = types.ModuleType("magic")
    magic.__spec__ = importlib.machinery.ModuleSpec("magic", None)
    monkeypatch.setitem(sys.modules, "magic", magic)
    table = pa.table({"other": list(range(7)), "text": TEXTS})
    parquet = io.BytesIO()
    pq.write_table(table, parquet)
    warc = io.BytesIO()
    writer = WARCWriter(warc, gzip=True)
    kind = {"WARC-Identified-Payload-Type": "text/plain"}
    for text in TEXTS:
        payload = io.BytesIO(text.encode())
        writer.write_record(
            writer.create_warc_record("https://a.b", "conversion", payload, warc_headers_dict=kind)
        )
    name = directory(
        a_txt=TEXTS[4],
        b_json_bz2=bz2.compress(lines(TEXTS).encode()),
        c_parquet=parquet.getvalue(),
        d_warc_wet_gz=warc.getvalue(),
    )
    config = dataclasses.replace(bpe_config, sources=(name,))
    found = tokenised(config, tmp_path / "shards")
    assert found == {"text/train": encoded(config, [TEXTS[4], *TEXTS, *TEXTS, *TEXTS])}


def test_a_task_has_its_own_files_and_leaves_no_shard_without_documents(
    bpe_config, directory, tmp_path
):
    name = directory(a_txt="a", b_txt="b", c_txt=" ", d_txt="d", e_txt="e", f_txt="\n")
    config = dataclasses.replace(bpe_config, sources=(name,))
    found = tokenised(config, tmp_path / "shards", tasks=3)
    assert found == {"text/train": encoded(config, ["a", "d", "b", "e"])}
    shards = sorted(path.name for path in (tmp_path / "shards/text/train").glob("*.ds*"))
    assert {name[:5] for name in shards} == {"00000", "00001"} and len(shards) == 6


def test_what_hugging_face_saves_is_read_with_its_splits(bpe_config, tmp_path):
    splits = {"train": {"text": TEXTS}, "test": {"text": ["held out"]}}
    saved = {name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "set")
    config = dataclasses.replace(bpe_config, sources=(str(tmp_path / "set"),))
    assert tokenised(config, tmp_path / "shards") == {
        "set/train": encoded(config, TEXTS),
        "set/validation": encoded(config, ["held out"]),
    }
    alone = dataclasses.replace(bpe_config, sources=(str(tmp_path / "set/train"),))
    found = tokenised(alone, tmp_path / "alone")
    assert found == {"train/train": encoded(config, TEXTS)}


def test_files_named_after_splits_and_two_sources_of_one_name(bpe_config, tmp_path):
    for place, text in (("a/c4", "first"), ("b/c4", "second")):
        (tmp_path / place / "train").mkdir(parents=True)
        (tmp_path / place / "train/0.txt").write_text(text)
        (tmp_path / place / "validation.txt").write_text(f"{text} held out")
    names = (str(tmp_path / "a/c4"), str(tmp_path / "b/c4/"))
    config = dataclasses.replace(bpe_config, sources=names)
    assert tokenised(config, tmp_path / "shards") == {
        "c4/train": encoded(config, ["first"]),
        "c4/validation": encoded(config, ["first held out"]),
        "c4_2/train": encoded(config, ["second"]),
        "c4_2/validation": encoded(config, ["second held out"]),
    }


@pytest.mark.parametrize("tasks", [1, 3])
def test_tasks_read_ranges_of_a_tfds_data_set(bpe_config, tmp_path, tasks):
    path = prepared(tmp_path, {"train": [f"{number} words" for number in range(10)], "test": ["x"]})
    config = dataclasses.replace(bpe_config, sources=(path,), text_key="body")
    found = tokenised(config, tmp_path / "shards", tasks)
    source = open_source(path, config)
    for split in ("train", "validation"):
        texts = [one.text.decode() for one in source.documents() if one.split == split]
        assert found[f"splits/{split}"] == encoded(config, texts)
    assert len(list((tmp_path / "shards").glob("*/train/*.ds"))) == tasks
    assert source.bytes == tfds_source.size(tfds_source.in_directory(Path(path))) > 0


def test_an_object_store_is_read_and_written(bpe_config):
    store = fsspec.filesystem("memory")
    store.pipe_file("/bucket/c4/en/a.train.jsonl", lines(TEXTS).encode())
    store.pipe_file("/bucket/c4/en/a.validation.jsonl", lines(["held out"]).encode())
    store.pipe_file("/bucket/c4/en/.hidden.jsonl", b"no text")
    config = dataclasses.replace(bpe_config, sources=("memory://bucket/c4/en",))
    assert tokenised(config, "memory://bucket/shards") == {
        "en/train": encoded(config, TEXTS),
        "en/validation": encoded(config, ["held out"]),
    }


@pytest.mark.parametrize(
    "files, words",
    [
        ({"a_md": "nothing to read"}, ["no .txt, .jsonl, .parquet", "1 '.md' files"]),
        ({"a_jsonl": '{"body": "x"}'}, ["a.jsonl:1", "'text'"]),
        ({"a_parquet": b"PAR1 is not enough"}, ["'a.parquet' in", "cannot be read"]),
        ({"a_jsonl_zst": b"no zstd"}, ["'a.jsonl.zst' in", "cannot be read"]),
        ({"train_txt": "x", "test_txt": ""}, ["no held-out split"]),
        ({"a\nb_txt": "x"}, ["no name that can be listed"]),
    ],
)
def test_text_that_cannot_be_read_is_refused_before_any_task(
    bpe_config, directory, tmp_path, files, words
):
    config = dataclasses.replace(bpe_config, sources=(directory(**files),))
    with pytest.raises(BadInput) as refused:
        tokenised(config, tmp_path / "shards")
    assert all(word in str(refused.value) for word in words)
    assert not list((tmp_path / "shards").rglob("*.ds"))


@pytest.mark.parametrize("column", [{"body": ["x"]}, {"text": [1]}])
def test_a_column_that_is_no_text_is_refused(bpe_config, tmp_path, column):
    (tmp_path / "text").mkdir()
    pq.write_table(pa.table(column), tmp_path / "text/a.parquet")
    config = dataclasses.replace(bpe_config, sources=(str(tmp_path / "text"),))
    with pytest.raises(BadInput, match=r"data\.text_key"):
        tokenised(config, tmp_path / "shards")


@pytest.mark.parametrize(
    "name, word",
    [
        ("embedded", "needs no shards"),
        ("planted", "needs no shards"),
        ("tokens:/data/*.ds", "tokens already"),
        ("/nowhere", "no such directory"),
        ("nonsense://bucket/c4", "cannot be opened"),
    ],
)
def test_a_source_without_files_is_refused(bpe_config, name, word):
    config = dataclasses.replace(bpe_config, sources=(name,))
    with pytest.raises(BadInput, match=word):
        list(shard_plan.parts_of(config))


def test_a_tokenizer_that_changes_between_tasks_is_refused(bpe_config, directory, tmp_path):
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes(TOKENIZER.read_bytes())
    config = dataclasses.replace(bpe_config, sources=(directory(a_txt="x"),), tokenizer=str(copy))
    parts = list(shard_plan.parts_of(config))
    folder = get_datafolder(str(tmp_path / "shards"))
    steps = datatrove_steps.pipeline(parts, folder, str(copy), "another identity", "text")
    with pytest.raises(BadInput, match="has changed"):
        steps[-1].run([], 0, 1)


def test_a_copied_tokenizer_has_the_same_identity(tmp_path):
    """Also if only a file beside it names the end of a document."""
    for spec, names in ((str(TOKENIZER), ["tokenizer.json"]), ("bytes", [])):
        assert list(shard_plan.tokenizer_files(spec, tokenizers.load(spec))) == names
    described = json.loads(TOKENIZER.read_text(encoding="utf-8"))
    renamed = json.dumps(described).replace(END, "<fin>")
    (tmp_path / "from").mkdir()
    (tmp_path / "from/tokenizer.json").write_text(renamed)
    (tmp_path / "from/config.json").write_text('{"eos_token_id": 0}')
    tokenizer = tokenizers.load(str(tmp_path / "from/tokenizer.json"))
    files = shard_plan.tokenizer_files(str(tmp_path / "from/tokenizer.json"), tokenizer)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    copy = tokenizers.load(str(tmp_path / "tokenizer.json"))
    assert (copy.identity, copy.eos) == (tokenizer.identity, "<fin>")


EXPECTED = json.loads((SHARDS / "expected.json").read_text(encoding="utf-8"))
OF_TEXT = json.loads((SHARDS / "texts.json").read_text(encoding="utf-8"))
WIDE = np.split(
    *[
        np.array(EXPECTED["datatrove_ds_wide"]["00000_unshuffled.ds"][key])
        for key in ("tokens", "document_ends")
    ]
)[:-1]


@pytest.mark.parametrize(
    "folder", ["datatrove_ds", "datatrove_ds_wide", "megatron", "megatron_wide"]
)
def test_the_writers_of_datatrove_write_the_committed_shards(folder, tmp_path, monkeypatch):
    """So the shards that the tests of the reading side use are those of today's writers."""
    monkeypatch.chdir(SHARDS.parents[2])  # the metadata names the tokenizer by a relative path
    spec = "tests/data/shards/tokenizer.json"
    output = str(tmp_path)
    if folder == "datatrove_ds_wide":
        name = "allenai/dolma2-tokenizer"
        file = TokenizedFile(
            output, "00000_unshuffled.ds", True, False, None, name, True, token_size=4
        )
        for ids in WIDE:
            file.write(ids.tolist(), None)
        file.close()
    elif folder == "megatron_wide":
        file = MegatronTokenizedFile(output, "00000_tokens", token_size=4)
        for ids in WIDE:
            file.write(ids.tolist())
        file.close()
    for rank, texts in enumerate(OF_TEXT if "wide" not in folder else []):
        documents = [TroveDocument(text, "") for text in texts]
        if folder == "megatron":
            step = MegatronDocumentTokenizer(output, tokenizer_name_or_path=spec, eos_token=END)
        else:
            step = DocumentTokenizer(output, spec, eos_token=END, shuffle_documents=False)
        step.run(documents, rank, len(OF_TEXT))
    committed = sorted((SHARDS / folder).iterdir())
    assert [path.name for path in committed] == sorted(path.name for path in tmp_path.iterdir())
    for path in committed:
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_the_committed_shards_hold_what_their_own_readers_found():
    types = {"": "<u2", "_wide": "<u4"}
    for folder, shards in EXPECTED.items():
        for name, found in shards.items():
            kind = types["_wide" if folder.endswith("_wide") else ""]
            tokens = np.fromfile(SHARDS / folder / name, kind)
            assert tokens.tolist() == found["tokens"]
            assert found["document_ends"][-1] == len(tokens)
    same = [EXPECTED[folder].values() for folder in ("datatrove_ds", "megatron", "olmo_npy")]
    assert list(same[0]) == list(same[1]) == list(same[2])
