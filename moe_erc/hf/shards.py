"""The tensors of a directory of safetensors, mapped into memory when they are read.

A shard has three parts: the length N of the header in 8 bytes; the header, N bytes of JSON,
{name: {"dtype", "shape", "data_offsets"}}; and the numbers. No code of a checkpoint is run, and its
header is checked before a number is read. The format is parsed here because the NumPy side of the
package `safetensors` has no float8 and does not tell where a tensor lies.
"""

import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from moe_erc.checks import BadInput

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "U8": np.dtype(np.uint8),
}
JSON_LIMIT = 100_000_000  # bytes; the format's own limit for a header
MOST_AXES = 8  # the product of a shape with millions of axes would take hours
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Tensor(NamedTuple):
    """Where a tensor lies."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def map(self) -> np.memmap:
        """The tensor as an array whose numbers are read when it is indexed.

        The file is closed with the last reference to it.
        """
        return np.memmap(self.path, DTYPES[self.dtype], "r", self.offset, self.shape)


def find_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name, from the headers of its shards alone."""
    tensors = {}
    for path in _shards(directory):
        for name, tensor in _header(path):
            if name in tensors:
                raise BadInput(
                    f"tensor {name!r} is in {tensors[name].path} and in {path}; "
                    "delete the stale shard"
                )
            tensors[name] = tensor
    return tensors


def read_config(directory: Path) -> dict:
    """config.json of a checkpoint, without the keys that are null."""
    path = directory / "config.json"
    if not path.is_file():
        raise BadInput(
            f"no config.json in {directory}; give the local directory of a Hugging Face model"
        )
    return {name: value for name, value in read_json(path).items() if value is not None}


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
      BadInput: if the file holds no object, or is larger than any genuine one.
    """
    size = path.stat().st_size
    if size > JSON_LIMIT:
        raise BadInput(f"{path} has {size} bytes, more than {JSON_LIMIT}; download it again")
    return _parse_json(path.read_bytes(), path)


def _shards(directory):
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return [_listed(directory, name) for name in _names_in(index)]
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise BadInput(
            f"{directory} holds {pickles[0]}, a pickle, which may run code when it is opened; "
            "save the model as safetensors (save_pretrained of transformers does)"
        )
    raise BadInput(f"no {single.name} and no {index.name} in {directory}; download the weights too")


def _names_in(index):
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise BadInput(
            f"{index}: weight_map must give the shard of every tensor; download it again"
        )
    return sorted(set(names))


def _listed(directory, name):
    path = directory / name
    if path.parent != directory or path.suffix != ".safetensors":
        raise BadInput(
            f"the index in {directory} lists {name!r}, "
            "which is no .safetensors file beside it; refused"
        )
    if not path.is_file():
        raise BadInput(f"{directory} has no shard {name!r}, which its index lists; download it too")
    return path


def _header(path):
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, JSON_LIMIT):
            raise BadInput(
                f"{path} announces a header of {length} bytes; "
                f"it may have {JSON_LIMIT} and the file has {size}; download it again"
            )
        header = _parse_json(file.read(length), f"the header of {path}")
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        tensors[name] = _tensor(path, name, entry, start=8 + length, size=size)
    _check_disjoint(path, {name: entry["data_offsets"] for name, entry in header.items()})
    return tensors.items()


def _check_disjoint(path, offsets):
    """Refuse tensors that share bytes; a tensor of no bytes shares none."""
    filled = sorted((begin, end, name) for name, (begin, end) in offsets.items() if begin < end)
    for (_, end, name), (begin, _, following) in itertools.pairwise(filled):
        if begin < end:
            raise BadInput(f"{path}: {name!r} and {following!r} share bytes; download it again")


def _tensor(path, name, entry, start, size):
    try:
        dtype = entry["dtype"]
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        is_sound = isinstance(dtype, str) and len(shape) <= MOST_AXES
        is_sound = is_sound and all(type(n) is int and n >= 0 for n in (*shape, begin, end - begin))
        if is_sound and dtype in DTYPES:
            is_sound = math.prod(shape) * DTYPES[dtype].itemsize == end - begin
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound:
        raise BadInput(
            f"{path}: dtype, shape and data_offsets of {name!r} do not agree; download it again"
        )
    if start + end > size:
        raise BadInput(
            f"{path} has {size} bytes, but {name!r} ends at byte {start + end}; download it again"
        )
    return Tensor(path, start + begin, dtype, shape)


def _parse_json(raw, place):
    try:
        value = json.loads(raw, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{place} is not JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise BadInput(
            f"{place} is a JSON {type(value).__name__}, not an object; download it again"
        )
    return value


def _without_twins(pairs):
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twin = next(name for name in names if names.count(name) > 1)
        raise BadInput(f"{twin!r} is in it twice")
    return dict(pairs)
