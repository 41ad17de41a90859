"""Checkpoints for tests: the committed ones are read as a whole, changed and written again."""

import json
import pathlib

import numpy as np

from moe_erc.hf.shards import DTYPES, find_tensors, read_json
from tests.tolerance import assert_close

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


def assert_coupling(moe, expected):
    """Every layer's M[i, j] = |router_i @ w_gate_j| is that of {number of the layer: M (E, E)}."""
    assert moe.layers == list(expected) and len(moe) == len(expected) > 0
    for (router_ED, w_gate_EDF), M_EE in zip(moe, expected.values(), strict=True):
        found_EE = np.linalg.norm(router_ED @ w_gate_EDF, axis=-1).T
        assert_close(found_EE, M_EE, terms=sum(w_gate_EDF.shape[1:]))  # sums over D and F
