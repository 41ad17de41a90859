"""Where families of MoE models keep routers and gates: one line each, by the `model_type` of config.json.

Names follow "model.layers.N."; {expert} is a number where each expert has a tensor of its own. A
family has several names because released files and those that transformers writes differ; a file
has one of them. To add one, add its line: shapes, dtypes and the numbers of layers and experts are
checked against config.json on opening.
"""

from collections.abc import Callable
from typing import NamedTuple

from moe_erc.hf.quantized import FLOAT8_BLOCK, MXFP4_BLOCK, dequantize_float8, dequantize_mxfp4

FLOATS = ("BF16", "F16", "F32")


class Part(NamedTuple):
    """One tensor of a matrix."""

    suffix: str  # of its name
    dtypes: tuple[str, ...]
    shape: Callable  # of E, D and F


class Layout(NamedTuple):
    """How a matrix lies in tensors: the router, or the gate (F, D) of one expert as torch has it."""

    parts: tuple[Part, ...]
    read: Callable  # of the parts as arrays, and the expert


ROUTER = Layout((Part("", FLOATS, lambda E, D, F: (E, D)),), lambda router_ED, _: router_ED)
EXPERT = Layout((Part("", FLOATS, lambda E, D, F: (F, D)),), lambda gate_FD, _: gate_FD)
EXPERT_FLOAT8 = Layout(
    (
        Part("", ("F8_E4M3",), lambda E, D, F: (F, D)),
        Part("_scale_inv", FLOATS, lambda E, D, F: (-(-F // FLOAT8_BLOCK), -(-D // FLOAT8_BLOCK))),
    ),
    lambda gate_FD, scales, _: dequantize_float8(gate_FD, scales),
)
# The gates of all experts in one tensor with what up is: the first half of the rows, or every other
# column.
HALVES = Layout(
    (Part("", FLOATS, lambda E, D, F: (E, 2 * F, D)),),
    lambda gate_up, expert: gate_up[expert, : gate_up.shape[1] // 2],
)
COLUMNS = Layout(
    (Part("", FLOATS, lambda E, D, F: (E, D, 2 * F)),),
    lambda gate_up, expert: gate_up[expert, :, ::2].T,
)
COLUMNS_MXFP4 = Layout(  # transposed, for blocks run along D
    (
        Part("_blocks", ("U8",), lambda E, D, F: (E, 2 * F, D // MXFP4_BLOCK, MXFP4_BLOCK // 2)),
        Part("_scales", ("U8",), lambda E, D, F: (E, 2 * F, D // MXFP4_BLOCK)),
    ),
    lambda blocks, scales, expert: dequantize_mxfp4(blocks[expert, ::2], scales[expert, ::2]),
)


class Family(NamedTuple):
    """The names a file may have for its routers and its gates, and how the latter lie."""

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
