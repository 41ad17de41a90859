"""Matmul work of the kernels that a program calls: grouped matmuls, and attention on TPUs.

A compiler knows nothing of the inside of a kernel. Its work is read from its shapes:

    ragged-dot-none, gmm   (M, K) x (E, K, N) -> (M, N)     lax.ragged_dot, megablox
    tgmm                   (M, K) x (M, N) -> (E, K, N)     megablox
    splash                 (…, T, d) x (…, T, d)            causal attention, by tiles of scores
"""

import math
import re
from typing import NamedTuple

from benchmarks.compiled import hlo

TARGET = r'custom_call_target="[^"]*(?:tpu_custom_call|gemm|matmul|triton|mosaic|fmha)'
GROUPED = "grouped"
ATTENTION = "attention"
UNKNOWN = "unknown"
# Matmuls of (T, d) x (d, T) or (T, T) x (T, d) in a kernel of splash attention. Where one kernel
# has both gradients, the scores and the gradient of the probabilities are computed once.
ATTENTION_MATMULS = {"fwd": 2, "dq": 3, "dkv": 4}
FUSED_BACKWARD = 5
ROW_TILES = (128, 256, 512, 1024)
FLOATS = ("bf16", "f16", "f32")


class Kernel(NamedTuple):
    """The work of one call."""

    kind: str  # GROUPED, ATTENTION, or UNKNOWN, which has no figures
    flops: int = 0  # of grouped rows as if each belonged to a group; of attention the causal half
    tile_flops: float = 0  # all that its tiles compute


def read(call: hlo.Instruction) -> Kernel | None:
    """The work of a custom call; None if it multiplies nothing."""
    is_metadata = call.name.startswith("ragged-dot-metadata")
    if is_metadata or not call.find(TARGET):
        return None
    name = f"{call.name} {call.origin}"
    if "splash" in name:
        return _attention(call, name)
    if "ragged-dot" in name or "gmm" in name:
        return _grouped(call)
    return Kernel(UNKNOWN)


def _grouped(call):
    rows = next(shape for shape in _floats(call) if len(shape.sizes) == 2)
    columns = call.shapes[0].sizes[-1]
    flops = 2 * math.prod(rows.sizes) * columns
    tiling = call.find(r'ragged_dot_tiling="\d+,\d+,(\d+)"')
    overhang = 1
    if tiling:  # the last tile of columns is computed whole
        tile = int(tiling[0])
        overhang = math.ceil(columns / tile) * tile / columns
    return Kernel(GROUPED, flops, flops * overhang * _shared_tiles(call, rows.sizes[0]))


def _shared_tiles(call, rows):
    """Tiles of rows that are computed, for every tile there is.

    A tile that two groups share is computed for both. The metadata of a kernel have an entry for
    each of these visits, at most one more for every group but the first.
    """
    visits = 0
    groups = 0
    for array in (call, *call.operands):
        for shape in array.shapes:
            if len(shape.sizes) == 3:
                groups = shape.sizes[0]
            elif shape.dtype == "s32" and len(shape.sizes) == 1:
                visits = max(visits, shape.sizes[0])
    for tile in ROW_TILES:
        tiles = rows // tile
        if tiles and tiles + groups - 1 == visits:
            return visits / tiles
    return 1


def _attention(call, name):
    query, key, *_ = _floats(call)
    (kernel,) = re.findall(r"_(fwd|dq|dkv)_", f"{call.name}_")[:1] or ["fwd"]
    matmuls = ATTENTION_MATMULS[kernel]
    if kernel == "dkv" and call.find(r"use_fused_bwd_kernel\W+true"):
        matmuls = FUSED_BACKWARD
    scores = 2 * math.prod(query.sizes) * key.sizes[-2]
    return Kernel(ATTENTION, matmuls * scores // 2, matmuls * scores * _causal_share(call))


def _causal_share(call):
    """The share of the tiles of scores that a causal mask leaves something of.

    The tables of a kernel, (heads, tiles of queries, tiles of keys), tell how many there are.
    """
    tables = []
    for operand in call.operands:
        for shape in operand.shapes:
            if shape.dtype not in FLOATS and len(shape.sizes) == 3:
                tables.append(shape.sizes)
    if not tables:
        return 1
    _, query_tiles, key_tiles = tables[0]
    needed = 0
    for query in range(query_tiles):
        needed += math.ceil((query + 1) * key_tiles / query_tiles)
    return needed / (query_tiles * key_tiles)


def _floats(call):
    found = []
    for operand in call.operands:
        for shape in operand.shapes:
            if shape.dtype in FLOATS:
                found.append(shape)
    return found
