"""Safetensors written tensor by tensor, and directories that are there once they are complete.

Sizes are known before numbers are, so a shard's header is written first and its tensors stream
behind it: the memory taken is that of one tensor, whatever the model's size. The same tensors give
the same bytes.
"""

import contextlib
import itertools
import json
import math
import os
import secrets
import shutil
from pathlib import Path

from moe_erc.checks import BadInput
from moe_erc.data import paths
from moe_erc.hf.shards import DTYPES

CODES = {dtype.name: code for code, dtype in DTYPES.items()}


def write_shards(directory: Path, shapes, tensors, dtype, shard_bytes):
    """Writes model.safetensors, or several of at most `shard_bytes` (or one tensor) and their index.

    shapes: {name: shape} in the order in which `tensors` yields arrays of `dtype`.
    """
    shards = _fill(shapes, dtype, shard_bytes)
    tensors = iter(tensors)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [
            f"model-{number:05}-of-{len(shards):05}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
        write_json(directory / "model.safetensors.index.json", {
            "metadata": {"total_size": sum(_bytes(shape, dtype) for shape in shapes.values())},
            "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
        })  # fmt: skip
    for file, shard in zip(files, shards, strict=True):
        with open(directory / file, "wb") as opened:
            opened.write(_header(shard, dtype))
            for array in itertools.islice(tensors, len(shard)):
                opened.write(array.tobytes())


def _fill(shapes, dtype, shard_bytes):
    """[{name: shape}], each as many tensors in a row as a shard holds."""
    shards = [{}]
    free = shard_bytes
    for name, shape in shapes.items():
        size = _bytes(shape, dtype)
        if size > free and shards[-1]:
            shards.append({})
            free = shard_bytes
        shards[-1][name] = shape
        free -= size
    return shards


def _header(shard, dtype):
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard.items():
        begin = end
        end = end + _bytes(shape, dtype)
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers behind it are aligned
    return len(text).to_bytes(8, "little") + text


def _bytes(shape, dtype):
    return math.prod(shape) * DTYPES[CODES[dtype]].itemsize


def write_json(path: Path, value):
    """The same value gives the same bytes."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def free_path(directory) -> Path:
    """The local path of this name.

    ValueError or FileExistsError of one line if it is none, or something is there.
    """
    if paths.is_remote(directory):
        raise BadInput(f"{directory} is in a bucket; give a local directory, and copy it there")
    path = paths.local(directory)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise BadInput(f"{path} is there already; give a new or an empty directory")
    return path


@contextlib.contextmanager
def new_directory(directory):
    """A directory that takes this name when the block is through, all at once.

    Of one that fails nothing is left.
    """
    path = free_path(directory)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        os.replace(unfinished, path)  # an empty directory gives way
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
