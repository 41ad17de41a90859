"""Router and gate weights of a Hugging Face MoE, read layer by layer from its safetensors; no model is built.

    for router_ED, w_gate_EDF in open_moe(directory):
        M_EE = coupling_matrix(router_ED, w_gate_EDF)

Dense layers and shared experts are left out, no router row being theirs, and so are biases.
"""

from dataclasses import dataclass, field

import numpy as np

from moe_erc.checks import BadInput
from moe_erc.data import paths
from moe_erc.hf.families import FAMILIES
from moe_erc.hf.layers import Layer, locate_layers
from moe_erc.hf.shards import find_tensors, read_config


@dataclass(frozen=True)
class Moe:
    """The MoE layers of a checkpoint: iterating reads them one by one as (router_ED, w_gate_EDF), NumPy float32.

    Row e of the router is expert e's, and x @ w_gate[e] is what its gate makes of x. No layer is
    kept: beside the one that the caller still holds there is at most the next.
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

    def __iter__(self):
        for layer in self._layers.values():
            yield np.array(layer.router.read(), np.float32), _read_gates(layer)


def _read_gates(layer):
    """Expert after expert into an array (E, F, D), as torch has them, seen as (E, D, F): a layer is in memory once."""
    w_gate_EFD = np.empty(layer.gates_shape, np.float32)
    for gate_FD, gate in zip(w_gate_EFD, layer.gates, strict=True):
        gate_FD[:] = gate.read()
    return w_gate_EFD.swapaxes(1, 2)


def open_moe(directory) -> Moe:
    """The MoE in a local directory, as a release of one of `families.py` lays it out, or `save_pretrained` does.

    Reads config.json and the headers of the shards, no tensor. ValueError or FileNotFoundError of
    one line for an unknown family, and where names, dtypes, shapes or counts in the shards are not
    what config.json makes them.
    """
    directory = paths.local(directory)
    config = read_config(directory)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise BadInput(
            f"config.json: model_type {family!r} is none of {', '.join(FAMILIES)}; "
            "add a line with its names to FAMILIES in moe_erc/hf/families.py"
        )
    layers = locate_layers(config, FAMILIES[family], find_tensors(directory))
    return Moe(family, directory.absolute().name, layers)
