"""Router and gate weights of a Hugging Face MoE, read layer by layer from its safetensors.

    for router_ED, w_gate_EDF in open_moe(directory):
        M_EE = coupling_matrix(router_ED, w_gate_EDF)

No model is built. Dense layers and shared experts are left out, because they have no router row of
a routed expert. Biases are left out too.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from moe_erc.checks import BadInput
from moe_erc.data import paths
from moe_erc.hf.families import FAMILIES, UNREADABLE, read_line
from moe_erc.hf.layers import Layer, locate_layers
from moe_erc.hf.moe_config import language_model
from moe_erc.hf.shards import find_tensors, read_config
from moe_erc.hf.unknown_family import refusal


@dataclass(frozen=True)
class Moe:
    """The MoE layers of a checkpoint.

    Iterating reads them one by one as (router_ED, w_gate_EDF), NumPy float32. Row e of the router
    belongs to expert e, whose gate computes x @ w_gate[e]. No layer is kept: in memory are the
    layer that the caller still holds and at most the next one.
    """

    family: str
    name: str
    _layers: dict[int, Layer] = field(repr=False)

    @property
    def layers(self) -> list[int]:
        """The numbers that the MoE layers have in the model."""
        return list(self._layers)

    def __len__(self):
        return len(self._layers)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for layer in self._layers.values():
            # Rows of what is no routed expert come last.
            rows = layer.router.read()[: len(layer.gates)]
            yield np.array(rows, np.float32), _read_gates(layer)


def _read_gates(layer):
    """The gates of a layer, (E, D, F).

    They are read one expert after the other into an array (E, F, D), the order of torch, of which a
    transposed view is returned. So a layer is in memory once.
    """
    w_gate_EFD = np.empty(layer.gates_shape, np.float32)
    for gate_FD, gate in zip(w_gate_EFD, layer.gates, strict=True):
        gate_FD[:] = gate.read()
    return w_gate_EFD.swapaxes(1, 2)


def open_moe(directory: os.PathLike | str, line: str | None = None) -> Moe:
    """The MoE in a local directory, as its family was released or as `save_pretrained` writes it.

    This reads config.json and the headers of the shards, and no tensor.

    Args:
      directory: of config.json and the shards
      line: ROUTER,GATE,LAYOUT of a family that `hf/families.py` does not have, as `read_line` reads
        it

    Raises:
      BadInput: for an unknown family, and if names, dtypes, shapes or counts in the shards do not
        agree with config.json.
    """
    directory = paths.local(directory)
    types, config = language_model(read_config(directory))
    name = directory.absolute().name
    if line is not None:
        family = read_line(line)
        return Moe(line, name, locate_layers(config, family, find_tensors(directory)))
    known = _known(types)
    tensors = find_tensors(directory)
    if known is None:
        raise refusal(types, config, tensors)
    return Moe(known, name, locate_layers(config, FAMILIES[known], tensors))


def _known(types):
    """The name of the family, or None. The innermost model type that is known decides."""
    names = [kind.removesuffix("_text") for kind in types if isinstance(kind, str)]
    for name in names:
        if name in UNREADABLE:
            raise BadInput(
                f"config.json: a coupling of {name!r} cannot be read: {UNREADABLE[name]}; "
                "name a model whose router has one row per expert and whose experts have a gate"
            )
        if name in FAMILIES:
            return name
    return None
