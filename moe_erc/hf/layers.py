"""The MoE layers that config.json announces, found in the shards.

Every count, name, dtype and shape is checked.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from moe_erc.checks import BadInput
from moe_erc.hf.families import ROUTER, Family, Layout
from moe_erc.hf.shards import Tensor

MOST = 2**20  # of layers, experts or width; no model has more


class Matrix(NamedTuple):
    """A router, or the gate of one expert: its tensors, and how it is read from them."""

    parts: tuple[Tensor, ...]
    layout: Layout
    expert: int

    def read(self) -> np.ndarray:
        """The matrix as torch has it: a router (E, D), a gate (F, D)."""
        return self.layout.read(*(part.map() for part in self.parts), self.expert)


class Layer(NamedTuple):
    """Where a layer lies."""

    router: Matrix
    gates: list[Matrix]  # by expert
    gates_shape: tuple[int, int, int]  # (E, F, D)


def locate_layers(
    config: Mapping[str, Any], family: Family, tensors: Mapping[str, Tensor]
) -> dict[int, Layer]:
    """The MoE layers by their numbers in the model.

    Raises:
      BadInput: if shards and config.json disagree.
    """
    sizes = (
        _number(config, "num_experts", "num_local_experts", "n_routed_experts"),
        _number(config, "hidden_size"),
        _number(config, "moe_intermediate_size", "intermediate_size"),
    )
    layers = _announced(config)
    _check_routers(layers, config, family, tensors)
    return {
        layer: _locate_layer(f"model.layers.{layer}.", family, tensors, sizes)
        for layer in sorted(layers)
    }


def _announced(config):
    """The numbers of the MoE layers: all but the dense ones, which config.json tells.

    Qwen lists dense layers or steps over them; DeepSeek begins with some.
    """
    first = _number(config, "first_k_dense_replace", least=0, default=0)
    step = _number(config, "decoder_sparse_step", default=1)
    dense = config.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise BadInput(
            f"config.json: mlp_only_layers is {dense!r}; it must be a list of whole numbers"
        )
    layers = range(first, _number(config, "num_hidden_layers"))
    return {layer for layer in layers if (layer + 1) % step == 0}.difference(dense)


def _check_routers(layers, config, family, tensors):
    """Refuse shards in which other layers than the announced ones have a router.

    Layers behind the last one, which predict several tokens ahead, may have one.
    """
    end = _number(config, "num_hidden_layers")
    further = range(end, end + _number(config, "num_nextn_predict_layers", least=0, default=0))
    found = set()
    for name in tensors:
        match = re.fullmatch(r"model\.layers\.(\d{1,7})\.(.+)", name)
        if match and match[2] in family.routers:
            found.add(int(match[1]))
    differing = sorted(found.difference(further) ^ layers)
    if differing:
        raise BadInput(
            f"layers {str(differing[:8])[1:-1]}, {len(differing)} in all, have a router in the "
            "shards and none by config.json, or the reverse; take both from one model"
        )
    if not layers:
        raise BadInput(
            f"config.json makes none of {end} layers an MoE layer; its model has no router to read"
        )


def _locate_layer(prefix, family, tensors, sizes):
    routers = [(prefix + name, ROUTER) for name in family.routers]
    gates = [(prefix + name, layout) for name, layout in family.gates]
    E, D, F = sizes
    for name, _ in gates:
        surplus = name.format(expert=E)
        if surplus != name and surplus in tensors:
            raise BadInput(
                f"{surplus!r} is in the shards, config.json has {E} experts; "
                "take both from one model"
            )
    router = _locate(routers, 0, tensors, sizes)
    return Layer(router, [_locate(gates, expert, tensors, sizes) for expert in range(E)], (E, F, D))


def _locate(candidates, expert, tensors, sizes):
    """The one candidate (name, layout) in the shards; its first part decides, by name and dtype."""
    found = []
    forms = []
    for pattern, layout in candidates:
        name = pattern.format(expert=expert)
        first = layout.parts[0]
        tensor = tensors.get(name + first.suffix)
        if tensor is not None and tensor.dtype in first.dtypes:
            found.append((name, layout))
        forms.append(f"{name}{first.suffix} ({'/'.join(first.dtypes)})")
    if not found:
        raise BadInput(
            f"the shards have no {' or '.join(forms)}; "
            "download them all, of a release in one of these forms"
        )
    if len(found) > 1:
        raise BadInput(
            f"the shards have both {found[0][0]!r} and {found[1][0]!r}; "
            "save the model again, in one form"
        )
    [(name, layout)] = found
    parts = [_checked(name + part.suffix, part, tensors, sizes) for part in layout.parts]
    return Matrix(tuple(parts), layout, expert)


def _checked(name, part, tensors, sizes):
    if name not in tensors:
        raise BadInput(f"no tensor {name!r} in the shards; download them again")
    tensor = tensors[name]
    shape = part.shape(*sizes)
    if tensor.dtype not in part.dtypes or tensor.shape != shape:
        raise BadInput(
            f"{name!r} is {tensor.dtype} {tensor.shape}, "
            f"by config.json {' or '.join(part.dtypes)} {shape}; take both from one model"
        )
    return tensor


def _number(config, *names, least=1, default=None):
    """The value of the first of these names that config.json has."""
    value = next((config[name] for name in names if name in config), default)
    if type(value) is not int or not least <= value <= MOST:
        raise BadInput(
            f"config.json: {' or '.join(names)} is {value!r}; "
            f"the model needs a whole number of {least} to {MOST}"
        )
    return value
