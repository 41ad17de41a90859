"""Files made to do harm: nothing in them is run, nothing beside them is opened, and the error is one line."""

import ast
import contextlib
import gc
import json
import os
import pathlib
import pickle
import shutil
import time
import tracemalloc

import jax.numpy as jnp
import pytest

from moe_erc.data import streams, text, text_files, tfds_metadata, tfds_source, tokenizer
from moe_erc.data.config import DataConfig
from moe_erc.diagnosis.curves import read_metrics
from moe_erc.hf import olmoe_config, tokenizer_files
from moe_erc.hf.inspect import open_moe
from moe_erc.hf.shards import find_tensors
from moe_erc.training import digests
from moe_erc.training.checkpoint import Checkpoints
from tests.hf import checkpoint

ROOT = pathlib.Path(__file__).parents[1]


class Payload:
    """Unpickled, it makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def payload(tmp_path):
    """A pickle that leaves a mark where it is opened; it must not have at the end of the test."""
    mark = tmp_path / "mark"
    pickled = pickle.dumps(Payload(mark))
    pickle.loads(pickled)
    mark.rmdir()  # so it works
    yield pickled
    assert not mark.exists()


@contextlib.contextmanager
def soon(times):
    """What happens inside takes at most so many times the work that the same processor has with 3 MB of JSON.

    However slow it is: what grows with the square of its input takes a million times as much.
    """
    numbers = json.dumps([2**40] * 200_000)
    start = time.process_time()
    json.loads(numbers)
    between = time.process_time()
    yield
    assert time.process_time() - between < times * (between - start)


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "given").mkdir()
    return tmp_path / "given"


def refuses(call, *arguments, words=()):
    """One line that has these words; and no file appears, here or beside."""
    root = next((place.parent for place in arguments if isinstance(place, pathlib.Path) and place.is_dir()), None)
    before = root and sorted(root.rglob("*"))
    with pytest.raises((ValueError, OSError)) as refusal:
        call(*arguments)
    message = str(refusal.value)
    assert "\n" not in message and all(str(word) in message for word in words), message
    assert before == (root and sorted(root.rglob("*")))


# ---------------------------------------------------------------------------------------------------- pickles
@pytest.mark.parametrize("name, call", [
    ("pytorch_model.bin", find_tensors),
    ("model.safetensors", find_tensors),
    ("model.safetensors.index.json", find_tensors),
    ("config.json", open_moe),
    ("index.json", lambda directory: list(streams.read(directory, "text"))),
    ("features.json", tfds_source.in_directory),
    ("data.jsonl", lambda directory: list(text_files.documents(directory, "text", 0.0))),
    ("metrics.npy", lambda directory: text_files.find(directory)),
])  # fmt: skip
def test_a_pickle_is_not_opened(name, call, directory, payload):
    (directory / name).write_bytes(payload)
    refuses(call, directory, words=[directory])


def test_a_pickle_is_no_tokenizer(directory, payload):
    path = directory / "tokenizer.json"
    path.write_bytes(payload)
    assert tokenizer_files.tokenizer_of(directory, "bytes") == str(path)
    refuses(tokenizer.load, str(path), words=[path])


def test_code_that_a_config_names_is_not_run(directory, tmp_path):
    shutil.copytree(checkpoint.FAMILIES / "olmoe", directory, dirs_exist_ok=True)
    (directory / "modeling_evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'mark')!r})")
    config = json.loads((directory / "config.json").read_text())
    named = {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Model"}, "trust_remote_code": True}
    (directory / "config.json").write_text(json.dumps(config | named))
    assert len(list(open_moe(directory))) == 2
    assert not (tmp_path / "mark").exists()


# ---------------------------------------------------------------------------------------------------- safetensors
def entry(begin, end, shape=None):
    return {"dtype": "U8", "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1, 200])
def test_a_header_is_no_longer_than_its_file(length, directory):
    (directory / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    refuses(find_tensors, directory, words=[f"{length} bytes"])
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@pytest.mark.parametrize("header, words", [
    ('{"a": ' * 50_000, ["JSON"]),
    (json.dumps({"a": entry(0, 8), "b": entry(7, 9)}), ["'a'", "'b'", "share"]),
    (json.dumps({"b": entry(0, 8), "a": entry(0, 8)}), ["'a'", "'b'", "share"]),
    (json.dumps({"a": entry(0, 17)}), ["'a'", "ends at byte"]),
    (json.dumps({"a": entry(2**62, 2**62 + 8)}), ["'a'", "ends at byte"]),
    (f'{{"a": {json.dumps(entry(0, 8))}, "a": {json.dumps(entry(8, 16))}}}', ["'a'", "twice"]),
    (json.dumps({"a": entry(0, 0, [2**40] * 200_000 + [0])}), ["'a'", "do not agree"]),
    ('{"a": {"dtype": "U8", "shape": [%s], "data_offsets": [0, 8]}}' % ("9" * 5000), ["JSON"]),
    (json.dumps({"a\nb": {}}), ["'a\\nb'"]),
], ids=["deep", "overlap", "same", "behind", "far", "twins", "axes", "digits", "newline"])  # fmt: skip
def test_a_header_that_lies(header, words, directory):
    checkpoint.write_raw(directory / "model.safetensors", header, bytes(16))
    with soon(times=100):
        refuses(find_tensors, directory, words=[directory, *words])


def test_tensors_of_no_bytes_share_none(directory):
    header = {"a": entry(0, 8), "none": entry(4, 4, [0, 3]), "b": entry(8, 16)}
    checkpoint.write_raw(directory / "model.safetensors", json.dumps(header), bytes(16))
    assert list(find_tensors(directory)) == ["a", "none", "b"]


@pytest.mark.parametrize("length", ["4096", 2**70, -1, 1e9, True, [1]])
def test_the_length_in_a_config_is_a_length(length):
    refuses(olmoe_config.context_length, {"max_position_embeddings": length}, words=["max_position_embeddings"])


# ---------------------------------------------------------------------------------------------------- tokenizers
def tokenizer_json(**model):
    return json.loads(tokenizer_files.BYTE_LEVEL) | {"added_tokens": [], "model": {"type": "BPE", "merges": []} | model}


@pytest.mark.parametrize("content", [
    b"", b"\xff\xfe", b"[" * 100_000, b'{"model": ' * 50_000,
    json.dumps(tokenizer_json(vocab={})).encode(),
    json.dumps(tokenizer_json(vocab="../../secret")).encode(),
    json.dumps(tokenizer_json(vocab={"a": -1})).encode(),
    json.dumps(tokenizer_json(vocab={"a": 2**40})).encode(),
    json.dumps(tokenizer_json(vocab={"a": 0}, merges=[["a", "../b"]])).encode(),
    json.dumps(tokenizer_json(type="../evil", vocab={"a": 0})).encode(),
], ids=["empty", "bytes", "deep list", "deep", "no vocabulary", "path", "negative", "large", "merge", "type"]
)  # fmt: skip
def test_a_tokenizer_that_is_none(content, directory):
    (directory / "tokenizer.json").write_bytes(content)
    refuses(tokenizer.load, str(directory / "tokenizer.json"), words=[directory / "tokenizer.json"])


def test_files_that_a_tokenizer_names_are_not_opened(directory, tmp_path):
    # transformers reads tokenizer_config.json, which may name any file; here tokenizer.json alone is read.
    (tmp_path / "secret.json").write_text(tokenizer_files.BYTE_LEVEL)
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_file": "../secret.json"}))
    refuses(tokenizer_files.tokenizer_of, directory, "bytes", words=["no tokenizer.json"])


def test_a_tokenizer_neither_cuts_nor_pads(directory):
    content = json.loads(tokenizer_files.BYTE_LEVEL)
    content["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 256,
                          "pad_type_id": 0, "pad_token": "<|endoftext|>"}  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer.load(str(directory / "tokenizer.json")).encode("abcd").tolist() == [97, 98, 99, 100]


# ---------------------------------------------------------------------------------------------------- data sets
def test_a_data_set_imports_no_module_that_it_names(directory, tmp_path, monkeypatch):
    (tmp_path / "evil_features.py").write_text(f"import os; os.mkdir({str(tmp_path / 'mark')!r})")
    monkeypatch.syspath_prepend(tmp_path)
    (directory / "dataset_info.json").write_text('{"name": "d", "version": "1.0.0", "fileFormat": "array_record"}')
    for content in (
        {"pythonClassName": "evil_features.Text"},
        {"type": "evil_features.Text", "content": {}},
        {"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
         "featuresDict": {"features": {"text": {"python_class_name": "evil_features.Text"}}}},
    ):  # fmt: skip
        (directory / "features.json").write_text(json.dumps(content))
        refuses(tfds_source.in_directory, directory, words=["'evil_features.Text'"])
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("content, words", [
    ({"splits": [{"name": "train", "filepathTemplate": "../../{SPLIT}"}]}, ["../../{SPLIT}"]),
    ({"splits": [{"name": "train", "filepathTemplate": "/etc/passwd"}]}, ["/etc/passwd"]),
])  # fmt: skip
def test_a_data_set_opens_no_file_elsewhere(content, words, directory):
    (directory / "dataset_info.json").write_text(json.dumps(content))
    refuses(tfds_metadata.check, directory, words=words)


STREAM = {"split": "train", "domain": "", "file": "train-text.bin", "tokens": 2, "bytes": 1, "documents": 1,
          "sha256": ""}  # fmt: skip


@pytest.mark.parametrize("change", [
    {"file": "../secret.bin"},
    {"file": "../secret.bin", "split": "..", "domain": "/secret"},
    {"split": "../train", "file": "../train-text.bin"},
    {"tokens": "2"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", ["<u2", "O"])
def test_an_index_of_streams_names_its_own_files_alone(change, dtype, directory):
    (directory.parent / "secret.bin").write_bytes(bytes(4))
    (directory / "train-text.bin").write_bytes(bytes(4))
    (directory / "index.json").write_text(json.dumps({"dtype": "<u2", "streams": [STREAM]}))
    assert len(list(streams.read(directory, "text"))) == 1
    (directory / "index.json").write_text(json.dumps({"dtype": dtype, "streams": [STREAM | change]}))
    refuses(lambda place: list(streams.read(place, "text")), directory, words=["data.cache_dir"])


@pytest.mark.parametrize("index", ["[]", "3", "[" * 100_000, '{"dtype": "O", "streams": []}', '{"dtype": "<u2"}'])
def test_an_index_that_is_no_table(index, directory):
    (directory / "index.json").write_text(index)
    refuses(lambda place: list(streams.read(place, "text")), directory, words=["data.cache_dir"])


# ---------------------------------------------------------------------------------------------------- checkpoints
@pytest.fixture
def saved(tmp_path):
    (tmp_path / "run").mkdir()
    with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
        checkpoints.save(1, {"w": jnp.arange(4.0)}, {"step": 1})
    return tmp_path / "run"


def forge(step, path, content):
    """Another file in a checkpoint, and digests that agree."""
    path.write_bytes(content)
    digests.DigestHandler().finalize(step / digests.ITEM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of orbax's threads
def test_a_pickle_in_a_checkpoint_is_not_opened(saved, payload):
    for path in sorted(path for path in (saved / "1").rglob("*") if path.is_file() and digests.ITEM not in path.parts):
        before = path.read_bytes()
        forge(saved / "1", path, payload)
        with Checkpoints(saved) as checkpoints:
            for read in (checkpoints.read_meta, lambda: checkpoints.restore({"w": jnp.zeros(4)})):
                try:
                    read()
                except Exception as error:  # which one is orbax's choice; that nothing is run is ours
                    assert not isinstance(error, MemoryError)
        forge(saved / "1", path, before)
    gc.collect()  # what orbax's threads left, here and not in the next test
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.read_meta() == {"step": 1}


@pytest.mark.parametrize("content", [
    b"[]", b"3", b'{"meta/x": 3}', b'{"meta/x": ["1", 2]}', b'{"../secret": [0, 0]}', b'{"/etc/passwd": [0, 0]}',
    b"[" * 100_000, b"\x80\x04.",
])  # fmt: skip
def test_digests_of_other_files_are_none(content, saved, monkeypatch):
    (saved.parent / "secret").write_bytes(b"")
    opened = []
    monkeypatch.setattr(digests, "digest", lambda path: opened.append(path) or [0, 0])
    (saved / "1" / digests.ITEM / digests.FILE).write_bytes(content)
    with Checkpoints(saved) as checkpoints:
        refuses(lambda: checkpoints.newest_intact(), words=["no intact checkpoint", digests.FILE])
    assert not opened


@pytest.mark.parametrize("line", [b"[" * 100_000, b"3", b"[]", b'{"loss/lm": 1}', b"\x80\x04."])
def test_metrics_that_are_none(line, directory):
    (directory / "metrics.jsonl").write_bytes(line + b'\n{"step": 2}\n')
    refuses(read_metrics, directory / "metrics.jsonl", words=["line 1"])


# ---------------------------------------------------------------------------------------------------- texts
def tokens(directory, **changes):
    config = {"sources": (str(directory),), "weights": (), "tokenizer": "bytes", "text_key": "text",
              "validation_fraction": 0.0, "sequence_length": 4,
              "cache_dir": str(directory.parent / "cache")}  # fmt: skip
    return text.prepare(DataConfig(**config | changes)).streams["train"]["given"].tokens_N


@pytest.mark.parametrize("content", [b"caf\xe9 caf\xc3", bytes(range(256)), b"no end of line"])
def test_any_bytes_are_a_text(content, directory):
    (directory / "a.txt").write_bytes(content)
    assert tokens(directory).tolist() == [*content, 256]
    path = directory.parent / "tokenizer.json"
    path.write_text(tokenizer_files.BYTE_LEVEL)
    replaced = content.decode(errors="replace").encode()
    assert tokens(directory, tokenizer=str(path)).tolist() == [*replaced, 256]


def test_lines_without_an_end_and_of_no_utf_8(directory):
    (directory / "a.jsonl").write_bytes(b'{"text": "abcd"}\r\n\n{"text": "efgh"}')
    assert bytes(token for token in tokens(directory) if token < 256) == b"abcdefgh"
    (directory / "a.jsonl").write_bytes(b'{"text": "abcd"}\n{"text": "caf\xe9"}')
    refuses(tokens, directory, words=["a.jsonl:2", "JSON"])


@pytest.mark.parametrize("name, around", [("a.txt", b"%b"), ("a.jsonl", b'{"text": "%b"}')])
def test_one_line_of_20_megabytes(name, around, directory):
    size = 20 * 10**6
    (directory / name).write_bytes(around % (b"a" * size))
    tracemalloc.start()
    with soon(times=1000):
        assert len(tokens(directory)) == size + 1
    # The line and its text, a byte each; tokens, with their end and as bytes, at two.
    assert tracemalloc.get_traced_memory()[1] < 10 * size
    tracemalloc.stop()


# ---------------------------------------------------------------------------------------------------- the code
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch"}
CALLS = {"eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load"}
OPTIONS = {"trust_remote_code": False, "allow_pickle": False, "weights_only": True}  # and what alone they may be
SOURCES = [*(ROOT / "moe_erc").rglob("*.py"), *(ROOT / "configs").rglob("*.py"), ROOT / "train.py", ROOT / "eval.py"]


def dangers(source):
    """What in a piece of code could run what a file holds."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in MODULES:
            yield node.module
        elif isinstance(node, ast.Call):
            name = called(node.func)
            options = {option.arg: option.value for option in node.keywords if option.arg in OPTIONS}
            if name in CALLS or (name in ("np.load", "numpy.load") and "allow_pickle" not in options):
                yield name
            yield from (key for key, value in options.items() if getattr(value, "value", None) is not OPTIONS[key])


def called(function):
    """The name, of a function or of a module's."""
    if isinstance(function, ast.Attribute):
        return f"{getattr(function.value, 'id', '')}.{function.attr}"
    return getattr(function, "id", "")


@pytest.mark.parametrize("source", [
    "import pickle", "from pickle import loads", "def f():\n    import torch", "eval('1')", "exec(x)", "__import__(x)",
    "np.load(x)", "np.load(x, allow_pickle=True)", "f(trust_remote_code=True)", "f(trust_remote_code=x)",
    "yaml.load(x)",
])  # fmt: skip
def test_dangers_are_seen(source):
    assert list(dangers(source))


def test_dangers_are_not_seen_where_there_are_none():
    source = "'''pickle eval(x)'''  # exec(x)\nnp.load(x, allow_pickle=False)\nmodel.eval()\nf(trust_remote_code=False)"
    assert not list(dangers(source))


def test_no_file_of_the_package_runs_what_it_reads():
    assert {path.name for path in SOURCES} > {"shards.py", "train.py", "eval.py", "base.py"}
    assert not {str(path): found for path in SOURCES if (found := list(dangers(path.read_text())))}
