"""Safetensors written tensor by tensor, and directories that exist only once they are complete.

All sizes are known before the numbers. The header of a shard is therefore written first, and its
tensors follow one by one: one tensor is in memory, whatever the size of the model. The same tensors
give the same bytes.
"""

import contextlib
import itertools
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_erc.checks import BadInput
from moe_erc.data import paths
from moe_erc.hf.shards import DTYPES

CODES = {dtype.name: code for code, dtype in DTYPES.items()}


def write_shards(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[np.ndarray],
    dtype: str,
    shard_bytes: int,
) -> None:
    """Write model.safetensors, or several shards and their index.

    Args:
      directory: which exists
      shapes: {name: shape} in the order of `tensors`
      tensors: arrays of `dtype`
      dtype: the name of a NumPy dtype
      shard_bytes: of tensors in a shard at most, unless one tensor alone has more
    """
    shards = _fill(shapes, dtype, shard_bytes)
    tensors = iter(tensors)
    files = ["model.safetensors"]
    if len(shards) > 1:
        numbers = range(1, len(shards) + 1)
        files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in numbers]
        total_size = sum(_bytes(shape, dtype) for shape in shapes.values())
        weight_map = {}
        for file, shard in zip(files, shards, strict=True):
            weight_map |= dict.fromkeys(shard, file)
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)
    for file, shard in zip(files, shards, strict=True):
        with open(directory / file, "wb") as opened:
            opened.write(_header(shard, dtype))
            for array in itertools.islice(tensors, len(shard)):
                opened.write(array.tobytes())


def _fill(shapes, dtype, shard_bytes):
    """The shards, [{name: shape}]; each has as many consecutive tensors as it can hold."""
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
    text += b" " * (-len(text) % 8)  # so that the numbers behind it are aligned
    return len(text).to_bytes(8, "little") + text


def _bytes(shape, dtype):
    return math.prod(shape) * DTYPES[CODES[dtype]].itemsize


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON; the same value gives the same bytes."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def free_path(directory: os.PathLike | str) -> Path:
    """The local path of this name.

    Raises:
      BadInput: if it is in a bucket, or if something is there already.
    """
    if paths.is_remote(directory):
        raise BadInput(f"{directory} is in a bucket; give a local directory, and copy it there")
    path = paths.local(directory)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise BadInput(f"{path} is there already; give a new or an empty directory")
    return path


@contextlib.contextmanager
def new_directory(directory: os.PathLike | str) -> Iterator[Path]:
    """A context that yields a directory to fill, and gives it this name in one step at its end.

    If the block fails, nothing is left.
    """
    path = free_path(directory)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        os.replace(unfinished, path)  # an empty directory gives way
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
