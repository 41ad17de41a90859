"""Where tensors lie in safetensors.

A directory whose files contradict each other is refused before a number is read.
"""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from moe_erc.checks import BadInput
from moe_erc.hf.shards import JSON_LIMIT, find_tensors, read_json
from tests.hf import checkpoint


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.uint8]
)
def test_a_tensor_is_mapped_where_it_lies(dtype, tmp_path):
    before, wanted = np.ones(3, np.uint8), np.arange(6).reshape(2, 3).astype(dtype)
    checkpoint.write_shard(tmp_path / "model.safetensors", {"before": before, "wanted": wanted})
    tensors = find_tensors(tmp_path)
    assert list(tensors) == ["before", "wanted"]
    mapped = tensors["wanted"].map()
    assert isinstance(mapped, np.memmap) and not mapped.flags.writeable
    np.testing.assert_array_equal(mapped[:, 1::2], wanted[:, 1::2])


def test_what_the_reference_writes_is_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = {
        "a": np.arange(5, dtype=np.float32),
        "b": np.eye(3, dtype=np.float16),
        "c": np.zeros((0, 4), np.uint8),
    }
    safetensors.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "np"})
    found = find_tensors(tmp_path)
    assert found.keys() == tensors.keys() and found["c"].shape == (0, 4)
    for name in "ab":
        np.testing.assert_array_equal(found[name].map(), tensors[name])


def test_a_dtype_that_nobody_asks_for_does_no_harm(tmp_path):
    header = {"ids": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}
    checkpoint.write_raw(tmp_path / "model.safetensors", json.dumps(header), bytes(8))
    assert find_tensors(tmp_path)["ids"].dtype == "I64"


@pytest.mark.parametrize("header, words", [
    ("{", ["JSON"]),
    ("[1]", ["list"]),
    ("[" * 100_000, ["JSON", "recursion"]),
    ('{"x": 1, "x": 2}', ["'x'", "twice"]),
    ('{"x": 3}', ["'x'", "do not agree"]),
], ids=["cut", "list", "deep", "twins", "number"])  # fmt: skip
def test_a_header_that_is_no_table_of_tensors(header, words, tmp_path):
    checkpoint.write_raw(tmp_path / "model.safetensors", header)
    refuses(tmp_path, ["model.safetensors", *words])


@pytest.mark.parametrize("change", [
    {"shape": [2, 4]},
    {"shape": [-2, -3]},
    {"shape": [True, 6]},
    {"shape": None},
    {"dtype": "BF16"},
    {"dtype": ["F32"]},
    {"data_offsets": [-24, 0]},
    {"data_offsets": [24, 0]},
    {"data_offsets": [0.0, 24.0]},
    {"data_offsets": [0, 12, 24]},
], ids=str)  # fmt: skip
def test_a_tensor_that_does_not_fit_its_bytes(change, tmp_path):
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    checkpoint.write_raw(
        tmp_path / "model.safetensors", json.dumps({"x": entry | change}), bytes(24)
    )
    refuses(tmp_path, ["model.safetensors", "'x'", "do not agree"])


@pytest.mark.parametrize("raw, words", [
    (b"", ["0 bytes", "has 0"]),
    (b"\0\0\0", ["has 3"]),
    ((17).to_bytes(8, "little") + bytes(16), ["17 bytes", "has 24"]),
    (bytes(7) + b"\xff", [str(255 << 56), str(JSON_LIMIT)]),
])  # fmt: skip
def test_a_file_that_has_no_header(raw, words, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(raw)
    refuses(tmp_path, words)


def test_a_header_has_a_limit(tmp_path):
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write((JSON_LIMIT + 1).to_bytes(8, "little"))
        file.truncate(2 * JSON_LIMIT)  # of zeros, and sparse
    refuses(tmp_path, [f"{JSON_LIMIT + 1} bytes", f"may have {JSON_LIMIT} ", str(2 * JSON_LIMIT)])


def test_a_truncated_shard(tmp_path):
    checkpoint.write_shard(tmp_path / "model.safetensors", {"x": np.zeros((2, 3), np.float32)})
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    refuses(tmp_path, [f"{len(whole) - 1} bytes", "'x'", f"byte {len(whole)}", "download it again"])


@pytest.mark.parametrize("name", [
    "../shard.safetensors", "/tmp/shard.safetensors", "sub/shard.safetensors",
    "shard.bin", "..", "",
])  # fmt: skip
def test_an_index_names_safetensors_beside_it_and_nothing_else(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    refuses(tmp_path, [repr(name), "refused"])


@pytest.mark.parametrize(
    "index", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}', '{"weight_map": {"x": 1}}']
)
def test_an_index_without_shards(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    refuses(tmp_path, ["weight_map"])


def test_shards_that_are_missing_or_overlap(tmp_path):
    shutil.copytree(checkpoint.FAMILIES / "mixtral", tmp_path, dirs_exist_ok=True)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    contents = shards[1].read_bytes()
    shards[1].unlink()
    refuses(tmp_path, [shards[1].name, "index"], BadInput)
    shards[1].write_bytes(shards[0].read_bytes())
    refuses(tmp_path, [shards[0].name, shards[1].name])
    shards[1].write_bytes(contents)
    assert find_tensors(tmp_path)


def test_a_pickle_is_not_opened(tmp_path):
    refuses(tmp_path, ["model.safetensors.index.json"], BadInput)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refuses(tmp_path, ["pytorch_model.bin", "pickle", "save_pretrained"])


def test_json_has_a_limit(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(JSON_LIMIT + 1)
    with pytest.raises(ValueError, match=f"{JSON_LIMIT + 1} bytes, more than {JSON_LIMIT}"):
        read_json(tmp_path / "config.json")


def refuses(directory, words, error=ValueError):
    with pytest.raises(error) as refusal:
        find_tensors(directory)
    message = str(refusal.value)
    assert "\n" not in message and all(word in message for word in words), message
