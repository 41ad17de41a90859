"""The MoE layers that config.json announces, found in the shards: every count, name, dtype and shape is checked."""

import re
from typing import NamedTuple

from moe_erc.checks import BadInput
from moe_erc.hf.families import ROUTER, Family, Layout
from moe_erc.hf.shards import Tensor

MOST = 2**20  # layers, experts, width: a config.json beyond it is no model's


class Matrix(NamedTuple):
    """A router, or the gate of one expert: its tensors, and how to take it out of them."""

    parts: tuple[Tensor, ...]
    layout: Layout
    expert: int

    def read(self):
        return self.layout.read(*(part.map() for part in self.parts), self.expert)


class Layer(NamedTuple):
    """Where a layer lies."""

    router: Matrix
    gates: list[Matrix]  # by expert
    gates_shape: tuple[int, int, int]  # (E, F, D)


def locate_layers(config, family: Family, tensors) -> dict[int, Layer]:
    """The MoE layers by their numbers in the model.

    ValueError of one line if shards and config.json disagree.
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
    """All layers but those that Qwen lists or steps over, and those that DeepSeek begins with."""
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
    """Those layers have a router and no others, save the ones behind the last that predict tokens further on."""
    end = _number(config, "num_hidden_layers")
    further = range(end, end + _number(config, "num_nextn_predict_layers", least=0, default=0))
    names = (re.fullmatch(r"model\.layers\.(\d{1,7})\.(.+)", name) for name in tensors)
    found = {int(name[1]) for name in names if name and name[2] in family.routers}.difference(
        further
    )
    differing = sorted(found ^ layers)
    if differing:
        raise BadInput(
            f"layers {str(differing[:8])[1:-1]}, {len(differing)} in all, have a router in the shards and none by "
            "config.json, or the reverse; take both from one model"
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
                f"{surplus!r} is in the shards, config.json has {E} experts; take both from one model"
            )
    router = _locate(routers, 0, tensors, sizes)
    return Layer(router, [_locate(gates, expert, tensors, sizes) for expert in range(E)], (E, F, D))


def _locate(candidates, expert, tensors, sizes):
    """The one candidate that is there: its first part tells, by name and dtype."""
    candidates = [
        (name.format(expert=expert), layout.parts[0], layout) for name, layout in candidates
    ]
    found = [
        (name, layout)
        for name, first, layout in candidates
        if name + first.suffix in tensors and tensors[name + first.suffix].dtype in first.dtypes
    ]
    if not found:
        known = " or ".join(
            f"{name}{first.suffix} ({'/'.join(first.dtypes)})" for name, first, _ in candidates
        )
        raise BadInput(
            f"the shards have no {known}; download them all, of a release in one of these forms"
        )
    if len(found) > 1:
        raise BadInput(
            f"the shards have both {found[0][0]!r} and {found[1][0]!r}; save the model again, in one form"
        )
    [(name, layout)] = found
    return Matrix(
        tuple(_checked(name + part.suffix, part, tensors, sizes) for part in layout.parts),
        layout,
        expert,
    )


def _checked(name, part, tensors, sizes):
    if name not in tensors:
        raise BadInput(f"no tensor {name!r} in the shards; download them again")
    tensor = tensors[name]
    shape = part.shape(*sizes)
    if tensor.dtype not in part.dtypes or tensor.shape != shape:
        raise BadInput(
            f"{name!r} is {tensor.dtype} {tensor.shape}, by config.json {' or '.join(part.dtypes)} {shape}; "
            "take both from one model"
        )
    return tensor


def _number(config, *names, least=1, default=None):
    """The first of these that config.json has."""
    value = next((config[name] for name in names if name in config), default)
    if type(value) is not int or not least <= value <= MOST:
        raise BadInput(
            f"config.json: {' or '.join(names)} is {value!r}; the model needs a whole number of {least} to {MOST}"
        )
    return value
