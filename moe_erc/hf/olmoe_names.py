"""OLMoE's tensors and our parameters: one table of names, read both ways.

A tensor of OLMoE is one matrix of one layer and one expert, (out, in) as torch has it. Ours are
(in, out) and stacked over layers and experts.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

Array = TypeVar("Array", jax.Array, np.ndarray)


class TensorName(NamedTuple):
    """How a parameter is stored.

    The name of its tensors has {} for each leading axis: the layer, and the expert.
    """

    name: str
    transposed: bool = False

    @property
    def axes(self) -> int:
        """How many of the parameter's axes are in the name."""
        return self.name.count("{}")

    def orient(self, array: Array) -> Array:
        """A matrix or a stack of matrices, from our layout to the stored one, and back."""
        return array.swapaxes(-1, -2) if self.transposed else array


LAYER = "model.layers.{}."
EXPERT = LAYER + "mlp.experts.{}."
TABLE = {
    "embed": TensorName("model.embed_tokens.weight"),
    "layers.attention_norm": TensorName(LAYER + "input_layernorm.weight"),
    "layers.attention.query": TensorName(LAYER + "self_attn.q_proj.weight", transposed=True),
    "layers.attention.query_norm": TensorName(LAYER + "self_attn.q_norm.weight"),
    "layers.attention.key": TensorName(LAYER + "self_attn.k_proj.weight", transposed=True),
    "layers.attention.key_norm": TensorName(LAYER + "self_attn.k_norm.weight"),
    "layers.attention.value": TensorName(LAYER + "self_attn.v_proj.weight", transposed=True),
    "layers.attention.output": TensorName(LAYER + "self_attn.o_proj.weight", transposed=True),
    "layers.moe_norm": TensorName(LAYER + "post_attention_layernorm.weight"),
    "layers.moe.router": TensorName(LAYER + "mlp.gate.weight"),
    "layers.moe.w_gate": TensorName(EXPERT + "gate_proj.weight", transposed=True),
    "layers.moe.w_up": TensorName(EXPERT + "up_proj.weight", transposed=True),
    "layers.moe.w_down": TensorName(EXPERT + "down_proj.weight", transposed=True),
    "final_norm": TensorName("model.norm.weight"),
    "head": TensorName("lm_head.weight"),  # absent where it is the embedding
}
# All experts of a layer in one tensor, as transformers has them in memory: matrices one after the
# other.
PACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class Entry(NamedTuple):
    """One tensor of a checkpoint: a slice of a parameter."""

    name: str
    path: str
    index: tuple[int, ...]  # of the layer, and of the expert
    shape: tuple[int, ...]  # as stored


def entries(params: Any) -> Iterator[Entry]:
    """Every tensor of the checkpoint of these parameters, which may be arrays or abstract."""
    for path, leaf in by_path(params).items():
        stored = TABLE[path]
        shape = leaf.shape[stored.axes :]
        if stored.transposed:
            shape = shape[::-1]
        for index in np.ndindex(*leaf.shape[: stored.axes]):
            yield Entry(stored.name.format(*index), path, index, shape)


def by_path(params: Any) -> dict[str, Any]:
    """{path of the table: leaf} of a tree of parameters."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def path_name(path: tuple) -> str:
    """The path of a leaf in the tree of parameters, as the table spells it."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
