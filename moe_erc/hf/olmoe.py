"""OLMoE checkpoints as transformers and vLLM read them, from our parameters and to them.

    params = open_olmoe(directory, config, abstract).read()
    export_olmoe(directory, model, params)

Neither direction needs torch, or memory for a second model. Files are mapped into memory, and only
the share of each device is read. One layer of one parameter is gathered and written at a time.
"""

import collections
import dataclasses
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_erc.checks import BadInput
from moe_erc.data import paths
from moe_erc.hf.engines import for_engines
from moe_erc.hf.layouts import FLOATS
from moe_erc.hf.olmoe_config import check_plain, check_same, config_json, model_fields
from moe_erc.hf.olmoe_names import PACKED, TABLE, by_path, entries, path_name
from moe_erc.hf.shard_writer import new_directory, write_json, write_shards
from moe_erc.hf.shards import DTYPES, Tensor, find_tensors, read_config
from moe_erc.model.config import ModelConfig
from moe_erc.model.export import as_softmax_router
from moe_erc.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Olmoe:
    """A checkpoint that fits a model: the places of its numbers are known, none is read yet."""

    _abstract: Any
    _tensors: dict[str, Tensor] = dataclasses.field(repr=False)

    def read(self) -> Any:
        """The tree of parameters: float32 arrays, each in its sharding."""

        def read(path, leaf):
            share_of = functools.partial(_read, TABLE[path_name(path)], self._tensors, leaf)
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, share_of)

        return jax.tree_util.tree_map_with_path(read, self._abstract)


def open_olmoe(directory: os.PathLike | str, config: ModelConfig, abstract: Any) -> Olmoe:
    """An OLMoE in a local directory: released, written by `save_pretrained`, or exported here.

    Args:
      directory: of config.json and the shards
      config: of the model that will use the parameters; it must have the sizes of the checkpoint
      abstract: the tree of parameters, each a `jax.ShapeDtypeStruct` with a sharding

    Raises:
      BadInput: for another kind of model, and for tensors that are missing, unknown, present twice,
        or of another shape.
    """
    directory = paths.local(directory)
    check_same(config, model_fields(read_config(directory)), directory)
    return Olmoe(abstract, tensors_of(directory, abstract))


def tensors_of(directory: pathlib.Path, abstract: Any) -> dict[str, Tensor]:
    """The tensors of an OLMoE by name, checked against its abstract parameters.

    BadInput for tensors that are missing, unknown, present twice, or of another shape.
    """
    tensors = _unpacked(find_tensors(directory))
    _check_tensors(tensors, entries(abstract))
    return tensors


def import_olmoe(directory: os.PathLike | str, config: ModelConfig, abstract: Any) -> Any:
    """The parameters of the checkpoint that `open_olmoe` opens, read."""
    return open_olmoe(directory, config, abstract).read()


def _unpacked(tensors):
    """The tensors, with one for every matrix where experts are packed into one tensor.

    The matrices of a packed tensor lie one after the other, so that only offsets are computed.
    """
    found = {}
    for name, tensor in tensors.items():
        packed = re.fullmatch(r"(.+\.experts)\.(gate_up_proj|down_proj)", name)
        matrices = ()
        if packed and tensor.dtype in FLOATS and len(tensor.shape) == 3:
            matrices = PACKED[packed[2]]
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
                    f"the shards have both {name!r} and {single!r}; "
                    "save the model again, in one form"
                )
            offset = tensor.offset + number * rows * columns * DTYPES[tensor.dtype].itemsize
            found[single] = Tensor(tensor.path, offset, tensor.dtype, (rows, columns))
    return found


def _check_tensors(tensors, wanted):
    """Refuse missing, misshapen and unknown tensors.

    It stops at the first missing one, because config.json may announce any number of tensors.
    """
    names = set()
    for name, _, _, shape in wanted:
        if name not in tensors:
            raise BadInput(
                f"no tensor {name!r} in the shards, which config.json announces; "
                "download them again"
            )
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype not in FLOATS:
            raise BadInput(
                f"{name!r} is {tensor.dtype} {tensor.shape}, "
                f"by config.json {' or '.join(FLOATS)} {shape}; take both from one model"
            )
        names.add(name)
    unknown = sorted(tensors.keys() - names)
    if unknown:
        raise BadInput(
            f"{unknown[0]!r}, {len(unknown)} in all: "
            "an OLMoE of this config.json has no such tensor"
        )


def _read(stored, tensors, leaf, share):
    """A share of a parameter, read matrix by matrix; `share` has a slice for every axis."""
    ranges = [range(size)[part] for part, size in zip(share, leaf.shape, strict=True)]
    array = np.empty([len(chosen) for chosen in ranges], leaf.dtype)
    # Leading axes, of layer and expert, are in the names of tensors. `place` counts within the
    # share, `index` within the whole parameter.
    leading = ranges[: stored.axes]
    of_matrix = share[stored.axes :]
    places = np.ndindex(*map(len, leading))
    for place, index in zip(places, itertools.product(*leading), strict=True):
        tensor = tensors[stored.name.format(*index)]
        array[place] = stored.orient(tensor.map())[of_matrix]
    return array


class About(NamedTuple):
    """The parts of a checkpoint beside its weights.

    `entries` are those of config.json; `files` are {name: content}.
    """

    entries: dict
    files: dict[str, str]


NOTHING = About({}, {})


def export_olmoe(
    directory: os.PathLike | str,
    model: Transformer,
    params: Mapping[str, Any],
    about: About = NOTHING,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    rows: Sequence[int] | None = None,
    repeat_kv_heads: bool = False,
) -> None:
    """Write a model as an OLMoE into a new local directory.

    The files are config.json, generation_config.json, the safetensors, and those of `about`. The
    same model gives the same bytes. All processes of a run call this; the first one writes.

    The head is written, also where it is the embedding, and rms_norm_eps is 1e-5: `engines.py` says
    why the model is the same.

    Args:
      directory: new or empty
      model: whose parameters these are
      params: the tree of parameters
      about: more entries of config.json, and more files
      dtype: float32, bfloat16 or float16; by default the dtype in which the model computes
      shard_bytes: the largest size of a file, unless one tensor is larger
      rows: for every token id the row of embedding and head that it has; None: all rows as they are
      repeat_kv_heads: write as many key and value heads as query heads, for llama.cpp

    Raises:
      BadInput: for a model that OLMoE cannot express, numbers that `dtype` cannot hold, and a
        directory that is not empty. Nothing is left behind.
    """
    check_plain(model.config)
    model, params = as_softmax_router(model, params)
    dtype = dtype or model.config.dtype
    known = [DTYPES[code].name for code in FLOATS]
    if dtype not in known:
        raise BadInput(f"an OLMoE in {dtype!r} cannot be written; use one of {', '.join(known)}")
    written = for_engines(model.config, by_path(params), rows, repeat_kv_heads)
    # Sorted by layer, so that a layer of a parameter is gathered once.
    by_layer = sorted(entries(written.shapes()), key=lambda entry: entry.index[:1])
    tensors = _gather(model.mesh, written, by_layer, dtype)
    if jax.process_index() > 0:
        # The other processes take part in gathering every tensor, and write none.
        collections.deque(tensors, maxlen=0)
        return
    config = config_json(written.config, dtype) | about.entries
    with new_directory(directory) as unfinished:
        write_json(unfinished / "config.json", config)
        token_ids = {name: config[name] for name in config if "token_id" in name}
        # Generation pads what has ended. In config.json a row of padding would have no gradient.
        token_ids["pad_token_id"] = token_ids["eos_token_id"]
        write_json(unfinished / "generation_config.json", token_ids)
        for name, content in about.files.items():
            (unfinished / name).write_text(content, encoding="utf-8")
        shapes = {entry.name: entry.shape for entry in by_layer}
        write_shards(unfinished, shapes, tensors, dtype, shard_bytes)


def _gather(mesh, written, by_layer, dtype):
    """Yield the tensors one by one on the host, in the order of `by_layer`."""
    everywhere = None if mesh is None else NamedSharding(mesh, P())
    # XLA has no program for float16 on a processor that cannot convert it (no F16C); NumPy converts
    # it anywhere.
    on_device = "float32" if dtype == "float16" else dtype

    @functools.partial(jax.jit, static_argnums=0, out_shardings=everywhere)
    def take(path, array, *layer):
        changed = written.change(path, array[layer])
        return TABLE[path].orient(changed).astype(on_device)

    groups = itertools.groupby(by_layer, lambda entry: (entry.path, entry.index[:1]))
    for (path, layer), group in groups:
        taken = jax.device_get(take(path, written.leaves[path], *layer))
        with np.errstate(over="ignore"):  # a number that does not fit is refused below
            taken = taken.astype(dtype, copy=False)
        if not np.isfinite(taken).all():
            name = TABLE[path].name.format(*layer, "*")
            raise BadInput(f"{name} is not finite in {dtype}; use another dtype")
        for entry in group:
            yield taken[entry.index[1:]]
