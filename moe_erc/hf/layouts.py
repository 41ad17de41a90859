"""How routers and gates lie in tensors: one line a layout.

A layout says which tensors make a matrix, their dtypes and shapes, and how the matrix is read. A
shape is a text of axes: E experts, D model width, F expert width, R rows of the router (more than E
in models whose router also scores what is no routed expert). "2F" is twice F, "EF" is E times F,
and "D/32" is D divided by 32, rounded up.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moe_erc.hf.quantized import FLOAT8_BLOCK, MXFP4_BLOCK, dequantize_float8, dequantize_mxfp4

FLOATS = ("BF16", "F16", "F32")
AXIS = re.compile(r"(\d*)([EDFR]*)(?:/(\d+))?")


class Sizes(NamedTuple):
    """The sizes of an MoE layer, by the letters of its axes."""

    E: int
    D: int
    F: int
    R: int


class Part(NamedTuple):
    """One tensor of a matrix."""

    suffix: str  # of its name
    dtypes: tuple[str, ...]
    axes: str
    axes_read: str = ""  # those under which it is read, if they are others


def shape(axes: str, sizes: Sizes) -> tuple[int, ...]:
    """The shape that axes such as "E 2F D" are in a model of these sizes."""
    return tuple(_length(axis, sizes) for axis in axes.split())


def _length(axis, sizes):
    factor, letters, divisor = AXIS.fullmatch(axis).groups()
    product = int(factor or 1) * math.prod(getattr(sizes, letter) for letter in letters)
    return -(-product // int(divisor or 1))


class Layout(NamedTuple):
    """How a matrix lies in tensors: a router (R, D), or the gate (F, D) of one expert."""

    parts: tuple[Part, ...]
    read: Callable  # of the parts as arrays, and the number of the expert


def _as_it_is(matrix: np.ndarray, expert: int) -> np.ndarray:
    return matrix


def _transposed(matrix: np.ndarray, expert: int) -> np.ndarray:
    return matrix.T


def _scaled(rows: np.ndarray, scale_D: np.ndarray, expert: int) -> np.ndarray:
    # The router of Gemma 4 scales the normalised token, and divides it by sqrt(D).
    scale_D = scale_D.astype(np.float32) / len(scale_D) ** 0.5
    return rows.astype(np.float32) * scale_D


def _float8(gate_FD: np.ndarray, scales: np.ndarray, expert: int) -> np.ndarray:
    return dequantize_float8(gate_FD, scales)


def _slice(gates: np.ndarray, expert: int) -> np.ndarray:
    return gates[expert]


def _first_half(gate_up: np.ndarray, expert: int) -> np.ndarray:
    return gate_up[expert, : gate_up.shape[1] // 2]


def _first_half_scaled(gate_up: np.ndarray, scale_D: np.ndarray, expert: int) -> np.ndarray:
    return _first_half(gate_up, expert).astype(np.float32) * scale_D.astype(np.float32)


def _even_rows(gate_up: np.ndarray, expert: int) -> np.ndarray:
    return gate_up[expert, ::2]


def _first_half_of_columns(gate_up: np.ndarray, expert: int) -> np.ndarray:
    return gate_up[expert, :, : gate_up.shape[2] // 2].T


def _even_columns(gate_up: np.ndarray, expert: int) -> np.ndarray:
    return gate_up[expert, :, ::2].T


def _even_rows_mxfp4(blocks: np.ndarray, scales: np.ndarray, expert: int) -> np.ndarray:
    return dequantize_mxfp4(blocks[expert, ::2], scales[expert, ::2])


def _one(axes: str, read: Callable) -> Layout:
    return Layout((Part("", FLOATS, axes),), read)


ROUTER = _one("R D", _as_it_is)
ROUTER_TRANSPOSED = _one("D R", _transposed)
# Both are read as they act on the normalised token: the router has a scale of its own, and the
# experts have the one of their norm.
ROUTER_SCALED = Layout(
    (Part("router.proj.weight", FLOATS, "R D"), Part("router.scale", FLOATS, "D")), _scaled
)
HALVES_SCALED = Layout(
    (
        Part("experts.gate_up_proj", FLOATS, "E 2F D"),
        Part("pre_feedforward_layernorm_2.weight", FLOATS, "D"),
    ),
    _first_half_scaled,
)
EXPERT_FLOAT8 = Layout(
    (
        Part("", ("F8_E4M3",), "F D"),
        Part("_scale_inv", FLOATS, f"F/{FLOAT8_BLOCK} D/{FLOAT8_BLOCK}"),
    ),
    _float8,
)
INTERLEAVED_MXFP4 = Layout(  # transposed, because blocks run along D
    (
        Part("_blocks", ("U8",), f"E 2F D/{MXFP4_BLOCK} {MXFP4_BLOCK // 2}"),
        Part("_scales", ("U8",), f"E 2F D/{MXFP4_BLOCK}"),
    ),
    _even_rows_mxfp4,
)
EXPERT = _one("F D", _as_it_is)
GATES = _one("E F D", _slice)
FLAT = Layout((Part("", FLOATS, "EF D", "E F D"),), _slice)
HALVES = _one("E 2F D", _first_half)
HALVES_OF_ROWS = _one("R 2F D", _first_half)  # with room for what is no routed expert
INTERLEAVED_ROWS = _one("E 2F D", _even_rows)
COLUMN_HALVES = _one("E D 2F", _first_half_of_columns)
INTERLEAVED_COLUMNS = _one("E D 2F", _even_columns)

# The words by which a user's line names the layout of its gates.
LAYOUTS = {
    "expert": EXPERT,
    "expert_float8": EXPERT_FLOAT8,
    "gates": GATES,
    "flat": FLAT,
    "halves": HALVES,
    "interleaved_rows": INTERLEAVED_ROWS,
    "column_halves": COLUMN_HALVES,
    "interleaved_columns": INTERLEAVED_COLUMNS,
}
