"""OLMoE's tensors and our parameters: one table of names, read both ways.

A tensor there is one matrix of one layer and one expert, (out, in) as torch has it; ours are (in,
out), stacked over layers and over experts.
"""

from typing import NamedTuple

import jax
import numpy as np


class TensorName(NamedTuple):
    """How a parameter is stored: the name of its tensors, with {} for its leading axes, layer and expert."""

    name: str
    transposed: bool = False

    @property
    def axes(self):
        """How many of the parameter's axes are in the name."""
        return self.name.count("{}")

    def orient(self, array):
        """A matrix or a stack of them, ours as it is stored and stored as it is ours."""
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
# All experts of a layer in one tensor, as transformers has them in memory: their matrices in a row.
PACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class Entry(NamedTuple):
    """One tensor of a checkpoint: a slice of a parameter."""

    name: str
    path: str
    index: tuple[int, ...]  # of the layer, and of the expert
    shape: tuple[int, ...]  # as stored


def entries(params):
    """Every tensor of the model that these parameters, arrays or abstract ones, are of."""
    for path, leaf in by_path(params).items():
        stored = TABLE[path]
        shape = leaf.shape[stored.axes :]
        for index in np.ndindex(*leaf.shape[: stored.axes]):
            yield Entry(
                stored.name.format(*index), path, index, shape[::-1] if stored.transposed else shape
            )


def by_path(params):
    """{path of the table: leaf}."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def path_name(path):
    """The keys on the way to a leaf, as the table has them."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
