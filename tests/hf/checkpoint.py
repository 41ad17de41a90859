"""Checkpoints for tests: the committed ones are read as a whole, changed and written again."""

import json
import pathlib

import numpy as np

from moe_erc.hf.shards import DTYPES, find_tensors, read_json

FAMILIES = pathlib.Path(__file__).parent / "families"


def load(family):
    """(config, {name: array}) of a committed checkpoint."""
    directory = FAMILIES / family
    tensors = {name: np.array(tensor.map()) for name, tensor in find_tensors(directory).items()}
    return read_json(directory / "config.json"), tensors


def write(directory, config, tensors):
    """Writes a checkpoint of one shard into the directory, which it returns."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    write_shard(directory / "model.safetensors", tensors)
    return directory


def write_shard(path, tensors):
    """Writes a shard: a header that says where each tensor lies, then the bytes of the tensors."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": names[array.dtype],
            "shape": array.shape,
            "data_offsets": [begin, end],
        }
    write_raw(path, json.dumps(header), b"".join(array.tobytes() for array in tensors.values()))


def write_raw(path, header, numbers=b""):
    """Writes a shard whose header is this text."""
    path.write_bytes(len(header.encode()).to_bytes(8, "little") + header.encode() + numbers)
