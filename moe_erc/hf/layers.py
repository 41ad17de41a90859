"""The MoE layers that config.json announces, found in the shards.

Every count, name, dtype and shape is checked.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from moe_erc.checks import BadInput
from moe_erc.hf.families import Family
from moe_erc.hf.layouts import Layout, Part, Sizes, shape
from moe_erc.hf.moe_config import depth, moe_layers, predicting_layers, sizes_of
from moe_erc.hf.shards import Tensor

# "model.layers.3.mlp.gate.weight": the stack, the number of the layer, the name in the layer.
IN_LAYER = re.compile(r"(?P<stack>(?:.+?\.)?(?:layers|blocks)\.)(?P<layer>\d{1,7})\.(?P<name>.+)")
# Stacks of layers beside the language model: images, sound, speech, several tokens ahead, and an
# encoder that is tied to the decoder (DiffusionGemma).
OTHERS = re.compile(r"vis|image|audio|talker|encoder|mtp|nextn")


class Matrix(NamedTuple):
    """A router, or the gate of one expert: its tensors, and how it is read from them."""

    parts: tuple[Tensor, ...]
    layout: Layout
    expert: int

    def read(self) -> np.ndarray:
        """The matrix as torch has it: a router (R, D), a gate (F, D)."""
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
    layers = moe_layers(config)
    stack, found = _stack(family, tensors)
    _check_routers(found, layers, config)
    located = {}
    for layer in sorted(layers):
        sizes = sizes_of(config, family, layer)
        located[layer] = _locate_layer(f"{stack}{layer}.", family, tensors, sizes)
    return located


def _check_routers(found, layers, config):
    """Refuses routers in other layers than the announced ones.

    Layers behind the last one, which predict several tokens ahead, may have one.
    """
    differing = sorted(found.difference(predicting_layers(config)) ^ layers)
    if differing:
        raise BadInput(
            f"layers {str(differing[:8])[1:-1]}, {len(differing)} in all, have a router in the "
            "shards and none by config.json, or the reverse; take both from one model"
        )
    if not layers:
        raise BadInput(
            f"config.json makes none of {depth(config)} layers an MoE layer; "
            "its model has no router to read"
        )


def _stack(family, tensors):
    """(what comes before the number of a layer, the layers that have a router)."""
    names = {name + layout.parts[0].suffix for name, layout in family.routers}
    stacks = {}
    for name in tensors:
        match = IN_LAYER.fullmatch(name)
        if match and match["name"] in names and not OTHERS.search(match["stack"]):
            stacks.setdefault(match["stack"], set()).add(int(match["layer"]))
    if len(stacks) > 1:
        raise BadInput(
            f"routers are in {' and in '.join(map(repr, stacks))}; "
            "save the language model by itself"
        )
    return stacks.popitem() if stacks else ("model.layers.", set())


def _locate_layer(prefix, family, tensors, sizes):
    routers = [(prefix + name, layout) for name, layout in family.routers]
    gates = [(prefix + name, layout) for name, layout in family.gates]
    [stored] = shape(family.stored, sizes)
    for name, _ in gates:
        surplus = _of_expert(name, stored)
        if surplus != name and surplus in tensors:
            raise BadInput(
                f"{surplus!r} is in the shards, config.json has {stored} experts; "
                "take both from one model"
            )
    router = _locate(routers, 0, tensors, sizes)
    found = [_locate(gates, expert, tensors, sizes) for expert in range(sizes.E)]
    return Layer(router, found, (sizes.E, sizes.F, sizes.D))


def _of_expert(pattern, expert):
    # Not str.format: a part of the name comes from the file, and may have braces.
    return pattern.replace("{expert}", str(expert))


def _locate(candidates, expert, tensors, sizes):
    """The one candidate (name, layout) in the shards; its first part decides, by name and dtype.

    Where two candidates differ in their axes alone, the shape decides.
    """
    found = []
    forms = []
    for pattern, layout in candidates:
        name = _of_expert(pattern, expert)
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
    if len({name for name, _ in found}) > 1:
        raise BadInput(
            f"the shards have both {found[0][0]!r} and {found[1][0]!r}; "
            "save the model again, in one form"
        )
    name, layout = found[0] if len(found) == 1 else _by_shape(found, tensors, sizes)
    parts = [_checked(name + part.suffix, part, tensors, sizes) for part in layout.parts]
    return Matrix(tuple(parts), layout, expert)


def _by_shape(found, tensors, sizes):
    """The candidate whose shape the tensor has; if it is none's, the first, which is refused."""
    name, first = found[0]
    fitting = []
    for _, layout in found:
        if tensors[name].shape == shape(layout.parts[0].axes, sizes):
            fitting.append(layout)
    if len(fitting) > 1:
        axes = " and ".join(f"({layout.parts[0].axes})" for layout in fitting)
        raise BadInput(
            f"{name!r} {tensors[name].shape} may have the axes {axes}, which cannot be told apart; "
            "name one by --family"
        )
    return name, fitting[0] if fitting else first


def _checked(name: str, part: Part, tensors: Mapping[str, Tensor], sizes: Sizes) -> Tensor:
    """The tensor, in the shape under which it is read."""
    if name not in tensors:
        raise BadInput(f"no tensor {name!r} in the shards; download them again")
    tensor = tensors[name]
    expected = shape(part.axes, sizes)
    if tensor.dtype not in part.dtypes or tensor.shape != expected:
        raise BadInput(
            f"{name!r} is {tensor.dtype} {tensor.shape}, "
            f"by config.json {' or '.join(part.dtypes)} {expected}; take both from one model"
        )
    return tensor._replace(shape=shape(part.axes_read or part.axes, sizes))
