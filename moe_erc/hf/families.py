"""Where families of MoE models keep routers and gates: one line a family.

A family is the `model_type` of config.json. Names follow "model.layers.N."; {expert} is a number if
each expert has a tensor of its own. A family has several names because released files and those
that transformers writes differ; a file has one of them.

To add a family, add its line. Shapes, dtypes and the numbers of layers and experts are checked
against config.json when a checkpoint is opened.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moe_erc.hf.quantized import FLOAT8_BLOCK, MXFP4_BLOCK, dequantize_float8, dequantize_mxfp4

FLOATS = ("BF16", "F16", "F32")


class Part(NamedTuple):
    """One tensor of a matrix."""

    suffix: str  # of its name
    dtypes: tuple[str, ...]
    shape: Callable  # of E, D and F


class Layout(NamedTuple):
    """How a matrix lies in tensors: a router, or the gate (F, D) of one expert as in torch."""

    parts: tuple[Part, ...]
    read: Callable  # of the parts as arrays, and the number of the expert


def _as_it_is(matrix: np.ndarray, expert: int) -> np.ndarray:
    return matrix


def _float8(gate_FD: np.ndarray, scales: np.ndarray, expert: int) -> np.ndarray:
    return dequantize_float8(gate_FD, scales)


def _first_half(gate_up: np.ndarray, expert: int) -> np.ndarray:
    return gate_up[expert, : gate_up.shape[1] // 2]


def _even_columns(gate_up: np.ndarray, expert: int) -> np.ndarray:
    return gate_up[expert, :, ::2].T


def _even_rows_mxfp4(blocks: np.ndarray, scales: np.ndarray, expert: int) -> np.ndarray:
    return dequantize_mxfp4(blocks[expert, ::2], scales[expert, ::2])


ROUTER = Layout((Part("", FLOATS, lambda E, D, F: (E, D)),), _as_it_is)
EXPERT = Layout((Part("", FLOATS, lambda E, D, F: (F, D)),), _as_it_is)
EXPERT_FLOAT8 = Layout(
    (
        Part("", ("F8_E4M3",), lambda E, D, F: (F, D)),
        Part("_scale_inv", FLOATS, lambda E, D, F: (-(-F // FLOAT8_BLOCK), -(-D // FLOAT8_BLOCK))),
    ),
    _float8,
)
# One tensor holds gate and up of all experts. The gate is the first half of the rows, or every
# other column.
HALVES = Layout((Part("", FLOATS, lambda E, D, F: (E, 2 * F, D)),), _first_half)
COLUMNS = Layout((Part("", FLOATS, lambda E, D, F: (E, D, 2 * F)),), _even_columns)
COLUMNS_MXFP4 = Layout(  # transposed, because blocks run along D
    (
        Part("_blocks", ("U8",), lambda E, D, F: (E, 2 * F, D // MXFP4_BLOCK, MXFP4_BLOCK // 2)),
        Part("_scales", ("U8",), lambda E, D, F: (E, 2 * F, D // MXFP4_BLOCK)),
    ),
    _even_rows_mxfp4,
)


class Family(NamedTuple):
    """The names that a file may have for its routers and its gates, and how the gates lie."""

    routers: tuple[str, ...]
    gates: tuple[tuple[str, Layout], ...]


def _by_expert(name):
    return (name, EXPERT), (name, EXPERT_FLOAT8), ("mlp.experts.gate_up_proj", HALVES)


QWEN = Family(("mlp.gate.weight",), _by_expert("mlp.experts.{expert}.gate_proj.weight"))
MIXTRAL_GATES = _by_expert("block_sparse_moe.experts.{expert}.w1.weight")

FAMILIES = {
    "olmoe": QWEN,
    "qwen2_moe": QWEN,
    "qwen3_moe": QWEN,
    "deepseek_v2": QWEN,
    "deepseek_v3": QWEN,
    "mixtral": Family(("block_sparse_moe.gate.weight", "mlp.gate.weight"), MIXTRAL_GATES),
    "phimoe": Family(("block_sparse_moe.gate.weight", "mlp.router.weight"), MIXTRAL_GATES),
    "granitemoe": Family(
        ("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
        (
            ("block_sparse_moe.input_linear.weight", HALVES),
            ("block_sparse_moe.experts.gate_up_proj", HALVES),
        ),
    ),
    "gpt_oss": Family(
        ("mlp.router.weight",),
        (("mlp.experts.gate_up_proj", COLUMNS), ("mlp.experts.gate_up_proj", COLUMNS_MXFP4)),
    ),
}
