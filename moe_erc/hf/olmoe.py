"""OLMoE as transformers and vLLM read it, made of our parameters, and our parameters made of it.

    params = open_olmoe(directory, config, abstract).read()        export_olmoe(directory, model, params)

Neither needs torch, nor memory for a second model: tensors are read where the map of the file has
them, each device's share alone, and written as they are gathered, of one parameter one layer at a
time.
"""

import collections
import dataclasses
import functools
import itertools
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_erc.checks import BadInput
from moe_erc.data import paths
from moe_erc.hf.families import FLOATS
from moe_erc.hf.olmoe_config import check_plain, check_same, config_json, model_fields
from moe_erc.hf.olmoe_names import PACKED, TABLE, by_path, entries, path_name
from moe_erc.hf.shard_writer import new_directory, write_json, write_shards
from moe_erc.hf.shards import DTYPES, Tensor, find_tensors, read_config
from moe_erc.model.export import as_softmax_router


@dataclasses.dataclass(frozen=True)
class Olmoe:
    """A checkpoint that fits a model: where its numbers lie is known, none is read yet."""

    _abstract: Any
    _tensors: dict[str, Tensor] = dataclasses.field(repr=False)

    def read(self):
        """The parameters, a float32 array in its sharding each."""

        def read(path, leaf):
            share_of = functools.partial(_read, TABLE[path_name(path)], self._tensors, leaf)
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, share_of)

        return jax.tree_util.tree_map_with_path(read, self._abstract)


def open_olmoe(directory, config, abstract) -> Olmoe:
    """An OLMoE in a local directory: released, written by `save_pretrained`, or exported here.

    config: the ModelConfig that shall compute with its parameters; its sizes must be the
    checkpoint's. abstract: the parameters' tree, a `jax.ShapeDtypeStruct` with a sharding for each.
    ValueError or FileNotFoundError of one line for what is no such model, and for tensors that are
    missing, unknown, there twice, or of another shape.
    """
    directory = paths.local(directory)
    check_same(config, model_fields(read_config(directory)), directory)
    tensors = _unpacked(find_tensors(directory))
    _check_tensors(tensors, entries(abstract))
    return Olmoe(abstract, tensors)


def import_olmoe(directory, config, abstract):
    """The parameters of `open_olmoe`, read."""
    return open_olmoe(directory, config, abstract).read()


def _unpacked(tensors):
    """The same with a tensor for every matrix of packed experts: nothing is moved, they lie in a row."""
    found = {}
    for name, tensor in tensors.items():
        packed = re.fullmatch(r"(.+\.experts)\.(gate_up_proj|down_proj)", name)
        matrices = (
            PACKED[packed[2]]
            if packed and tensor.dtype in FLOATS and len(tensor.shape) == 3
            else ()
        )
        if not matrices or not all(tensor.shape) or tensor.shape[1] % len(matrices):
            found[name] = tensor
            continue
        experts = tensor.shape[0]
        rows = tensor.shape[1] // len(matrices)
        columns = tensor.shape[2]
        for number, (expert, matrix) in enumerate(itertools.product(range(experts), matrices)):
            single = f"{packed[1]}.{expert}.{matrix}.weight"
            if single in tensors:
                raise BadInput(
                    f"the shards have both {name!r} and {single!r}; save the model again, in one form"
                )
            offset = tensor.offset + number * rows * columns * DTYPES[tensor.dtype].itemsize
            found[single] = Tensor(tensor.path, offset, tensor.dtype, (rows, columns))
    return found


def _check_tensors(tensors, wanted):
    """Stops at the first that is not there: what config.json announces may be without bounds."""
    names = set()
    for name, _, _, shape in wanted:
        if name not in tensors:
            raise BadInput(
                f"no tensor {name!r} in the shards, which config.json announces; download them again"
            )
        if tensors[name].shape != shape or tensors[name].dtype not in FLOATS:
            raise BadInput(
                f"{name!r} is {tensors[name].dtype} {tensors[name].shape}, by config.json {' or '.join(FLOATS)} "
                f"{shape}; take both from one model"
            )
        names.add(name)
    if unknown := sorted(tensors.keys() - names):
        raise BadInput(
            f"{unknown[0]!r}, {len(unknown)} in all: an OLMoE of this config.json has no such tensor"
        )


def _read(stored, tensors, leaf, share):
    """A share of a parameter, given as a slice along every axis, matrix by matrix."""
    ranges = [range(size)[part] for part, size in zip(share, leaf.shape, strict=True)]
    array = np.empty([len(chosen) for chosen in ranges], leaf.dtype)
    leading = ranges[: stored.axes]
    for place, index in zip(
        np.ndindex(*map(len, leading)), itertools.product(*leading), strict=True
    ):
        array[place] = stored.orient(tensors[stored.name.format(*index)].map())[
            share[stored.axes :]
        ]
    return array


class About(NamedTuple):
    """What a checkpoint says beside its weights: entries of config.json, and other files by name."""

    entries: dict
    files: dict[str, str]


NOTHING = About({}, {})


def export_olmoe(directory, model, params, about=NOTHING, dtype=None, shard_bytes=5 * 10**9):
    """Writes a model as an OLMoE into a new local directory: config.json, generation_config.json, safetensors, `about`.

    dtype: float32, bfloat16 or float16, by default what the model computes in. The same model gives
    the same bytes. Of several processes all call it and the first writes. ValueError or OSError of
    one line, with nothing left behind, for a model that no OLMoE computes, numbers that `dtype`
    cannot hold, and a directory that is not empty.
    """
    check_plain(model.config)
    model, params = as_softmax_router(model, params)
    dtype = dtype or model.config.dtype
    known = [DTYPES[code].name for code in FLOATS]
    if dtype not in known:
        raise BadInput(f"an OLMoE in {dtype!r} cannot be written; use one of {', '.join(known)}")
    by_layer = sorted(entries(params), key=lambda entry: entry.index[:1])
    tensors = _gather(model.mesh, params, by_layer, dtype)
    if jax.process_index() > 0:
        collections.deque(tensors, maxlen=0)  # takes its part in the gathering
        return
    config = config_json(model.config, dtype) | about.entries
    with new_directory(directory) as unfinished:
        write_json(unfinished / "config.json", config)
        write_json(
            unfinished / "generation_config.json",
            {name: config[name] for name in config if "token_id" in name},
        )
        for name, content in about.files.items():
            (unfinished / name).write_text(content, encoding="utf-8")
        write_shards(
            unfinished, {entry.name: entry.shape for entry in by_layer}, tensors, dtype, shard_bytes
        )


def _gather(mesh, params, by_layer, dtype):
    """The tensors one by one on the host."""
    everywhere = None if mesh is None else NamedSharding(mesh, P())
    leaves = by_path(params)
    # XLA has no program for float16 on a processor that cannot convert it (no F16C); NumPy converts
    # it anywhere.
    on_device = "float32" if dtype == "float16" else dtype

    @functools.partial(jax.jit, static_argnums=0, out_shardings=everywhere)
    def take(stored, array, *layer):
        return stored.orient(array[layer]).astype(on_device)

    for (path, layer), group in itertools.groupby(
        by_layer, lambda entry: (entry.path, entry.index[:1])
    ):
        with np.errstate(over="ignore"):  # what does not fit is refused below
            taken = jax.device_get(take(TABLE[path], leaves[path], *layer)).astype(
                dtype, copy=False
            )
        if not np.isfinite(taken).all():
            raise BadInput(
                f"{TABLE[path].name.format(*layer, '*')} is not finite in {dtype}; use another dtype"
            )
        for entry in group:
            yield taken[entry.index[1:]]
