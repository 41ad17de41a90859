"""Rows sorted by group times the matrix of their group, on GPU, by Pallas kernels for Triton.

    y[m]  = x[m] @ w[g]
    dx[m] = dy[m] @ w[g].T
    dw[g] = sum over rows m of g of outer(x[m], dy[m])

For y and dx a table says which rows a program multiplies: a block of rows of one group. The last
block of a group is partial and masked; an empty group has no block. Rows behind the last group are
a group of their own that has no matrix: their results are zeros.

For dw a program owns a tile of one matrix and walks the rows of its group. An empty group adds
nothing to the zeros that its tiles start from.

Operands keep their dtype; sums are float32. On CPU the kernels are interpreted, slowly, for tests.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Rows and columns of a tile of the result, and how many bytes of an operand's row are multiplied at
# a time. They are the fastest of those that `benchmarks/on_device.py` times on an H100. The second
# number of columns serves matrices whose width the first does not divide, and small GPUs.
ROWS = 128
COLUMNS = (256, 128)
# Compute capabilities with too little shared memory (100 KB) for the stages of the wide tile.
SMALL = ("7.5", "8.6", "8.7", "8.9", "12.0")
DEPTH_BYTES = 128
COMPILER = triton.CompilerParams(num_warps=8, num_stages=3)


@jax.custom_vjp
def pallas_matmul(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """(M, F) in the dtype of x, accumulated in float32.

    Groups follow each other and may be empty.
    """
    return _by_rows(x_MD, w_EDF, sizes_E, contracted=1)


def _forward(*inputs):
    return pallas_matmul(*inputs), inputs


def _backward(inputs, dy_MF):
    x_MD, w_EDF, sizes_E = inputs
    return (
        _by_rows(dy_MF, w_EDF, sizes_E, contracted=2),
        _by_matrices(x_MD, dy_MF, w_EDF, sizes_E),
        None,
    )


pallas_matmul.defvjp(_forward, _backward)


class _Span(NamedTuple):
    """Consecutive indices of an axis, and a mask of those inside; None if all are inside."""

    slice: pl.Slice
    inside: jax.Array | None


def _span(start, size, end):
    """`size` indices from `start` on; those before `end` are inside."""
    return _Span(pl.ds(start, size), start + jnp.arange(size) < end)


def _columns(width):
    """The columns of a tile: the most that divide `width`, the fewest where none do.

    On a GPU with little shared memory they are the fewest. The GPU that counts is this process's
    first device, also where a program is compiled for others.
    """
    if getattr(jax.local_devices()[0], "compute_capability", None) in SMALL:
        return COLUMNS[-1]
    for columns in COLUMNS:
        if width % columns == 0:
            return columns
    return COLUMNS[-1]


def _tile_of(index, size, whole):
    """Tile `index` of an axis of length `whole`, without a mask where tiles divide the axis."""
    if whole % size == 0:
        return _Span(pl.ds(index * size, size), None)
    return _span(index * size, size, whole)


def _at(ref, rows, columns, *leading):
    """Where a tile is in memory, and which of its elements are inside."""
    view = ref.at[(*leading, rows.slice, columns.slice)]
    shape = (rows.slice.size, columns.slice.size)
    inside = None
    if rows.inside is not None:
        inside = jnp.broadcast_to(rows.inside[:, None], shape)
    if columns.inside is not None:
        inside_columns = jnp.broadcast_to(columns.inside[None, :], shape)
        inside = inside_columns if inside is None else jnp.logical_and(inside, inside_columns)
    return view, inside


def _read(ref, rows, columns, *leading):
    """The values of a tile; zeros outside."""
    view, inside = _at(ref, rows, columns, *leading)
    return triton.load(view, mask=inside, other=None if inside is None else 0.0)


def _write(tile, ref, rows, columns, *leading):
    view, inside = _at(ref, rows, columns, *leading)
    triton.store(view, tile.astype(ref.dtype), mask=inside)


def _dot(a, b, axis_a, axis_b):
    """The product of two matrices over axis `axis_a` of a and `axis_b` of b, float32."""
    dtype = jnp.promote_types(a.dtype, b.dtype)
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(
        a.astype(dtype), b.astype(dtype), dimensions, preferred_element_type=jnp.float32
    )


def _by_rows(x_MD, w_EDF, sizes_E, contracted):
    """x @ w where axis 1 of w is `contracted`, x @ w.T where axis 2 is."""
    rows, depth = x_MD.shape
    groups = len(w_EDF)
    width = w_EDF.shape[3 - contracted]
    step = DEPTH_BYTES // x_MD.dtype.itemsize
    size = _columns(width)

    def kernel(x_ref, w_ref, group_ref, start_ref, end_ref, y_ref):
        columns = _tile_of(pl.program_id(0), size, width)
        block = pl.program_id(1)
        group = group_ref[block]
        own = _span(start_ref[block], ROWS, end_ref[block])

        def add(index, sum_RC):
            deep = _tile_of(index, step, depth)
            x_tile = _read(x_ref, own, deep)
            if contracted == 1:
                return sum_RC + _dot(x_tile, _read(w_ref, deep, columns, group), 1, 0)
            return sum_RC + _dot(x_tile, _read(w_ref, columns, deep, group), 1, 1)

        # A product, not `where`: Triton's lowering makes a boolean of two literals.
        steps = (group < groups).astype(jnp.int32) * pl.cdiv(depth, step)
        sum_RC = lax.fori_loop(0, steps, add, jnp.zeros((ROWS, size), jnp.float32))
        _write(sum_RC, y_ref, own, columns)

    table = _table(sizes_E, rows)
    # In this order, programs next to each other read the same rows.
    grid = (pl.cdiv(width, size), len(table[0]))
    result = jax.ShapeDtypeStruct((rows, width), x_MD.dtype)
    return _call(kernel, "grouped_matmul", grid, result, x_MD, w_EDF, *table)


def _table(sizes_E, rows):
    """(group, first row, end of the group's rows) of every block, as three arrays.

    There are as many blocks as there can be; those left over lie past the end.
    """
    sizes_G = jnp.append(sizes_E, rows - jnp.sum(sizes_E)).astype(jnp.int32)
    ends_G = jnp.cumsum(sizes_G)
    blocks_G = pl.cdiv(sizes_G, ROWS)
    last_G = jnp.cumsum(blocks_G)
    blocks = jnp.arange(pl.cdiv(rows, ROWS) + len(sizes_E), dtype=jnp.int32)
    groups_done = jnp.sum(blocks[:, None] >= last_G, axis=1, dtype=jnp.int32)
    groups = jnp.minimum(groups_done, len(sizes_E))
    ends = ends_G[groups]
    starts = ends - sizes_G[groups]
    first_blocks = (last_G - blocks_G)[groups]
    return groups, starts + (blocks - first_blocks) * ROWS, ends


def _by_matrices(x_MD, dy_MF, w_EDF, sizes_E):
    """x.T @ dy of every group, (E, D, F)."""
    groups, depth, width = w_EDF.shape
    step = DEPTH_BYTES // x_MD.dtype.itemsize
    size = _columns(width)

    def kernel(x_ref, dy_ref, start_ref, end_ref, dw_ref):
        columns = _tile_of(pl.program_id(0), size, width)
        deep = _tile_of(pl.program_id(1), ROWS, depth)
        group = pl.program_id(2)
        start = start_ref[group]
        end = end_ref[group]

        def add(index, sum_RC):
            rows = _span(start + index * step, step, end)
            return sum_RC + _dot(_read(x_ref, rows, deep), _read(dy_ref, rows, columns), 0, 0)

        steps = pl.cdiv(end - start, step)
        sum_RC = lax.fori_loop(0, steps, add, jnp.zeros((ROWS, size), jnp.float32))
        _write(sum_RC, dw_ref, deep, columns, group)

    ends_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    starts_E = ends_E - sizes_E
    grid = (pl.cdiv(width, size), pl.cdiv(depth, ROWS), groups)
    result = jax.ShapeDtypeStruct(w_EDF.shape, w_EDF.dtype)
    return _call(kernel, "grouped_matmul_dw", grid, result, x_MD, dy_MF, starts_E, ends_E)


def _call(kernel, name, grid, result, *operands):
    """The kernel's result; on CPU the kernel is interpreted."""
    call = partial(pl.pallas_call, kernel, result, grid=grid, name=name, compiler_params=COMPILER)
    return lax.platform_dependent(*operands, cpu=call(interpret=True), default=call())
