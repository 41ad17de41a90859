"""Rows sorted by group times the matrix of their group, on GPU: Pallas kernels that Triton compiles.

    y[m] = x[m] @ w[g]        dx[m] = dy[m] @ w[g].T        dw[g] = sum over rows m of g of outer(x[m], dy[m])

For the first two a table says which rows a program multiplies: a block of one group's, the last of
a group partial and masked, none of an empty group. Rows behind the last group are a group of their
own that has no matrix: zeros. For dw a program owns a tile of one matrix and walks the rows of its
group; of an empty one there is nothing to add to zero. Operands keep their dtype, sums are float32.
On CPU the kernels are interpreted: slow, to be tested.
"""

import functools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Rows and columns of a tile of the result, and how many bytes of a row of an operand are multiplied
# at a time: the fastest of those that `benchmarks/on_device.py` times on an H100. Fewer columns
# serve a matrix that they divide.
ROWS = 128
COLUMNS = (256, 128)
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
    """Consecutive indices of an axis, and which of them are inside; None if all are."""

    slice: pl.Slice
    inside: jax.Array | None


def _span(start, size, end):
    """`size` indices from `start` on, inside as far as `end`."""
    return _Span(pl.ds(start, size), start + jnp.arange(size) < end)


def _columns(width):
    """Of a tile: the widest that divides `width`, the narrowest where none does."""
    return next((columns for columns in COLUMNS if width % columns == 0), COLUMNS[-1])


def _tile_of(index, size, whole):
    """Tile `index` of an axis of length `whole`.

    No mask where tiles divide it: loads are then a quarter faster.
    """
    if whole % size == 0:
        return _Span(pl.ds(index * size, size), None)
    return _span(index * size, size, whole)


def _at(ref, rows, columns, *leading):
    """Where a tile is in memory, and which of its elements are inside."""
    view = ref.at[(*leading, rows.slice, columns.slice)]
    masks = []
    if rows.inside is not None:
        masks.append(rows.inside[:, None])
    if columns.inside is not None:
        masks.append(columns.inside[None, :])
    if not masks:
        return view, None
    shape = rows.slice.size, columns.slice.size
    return view, functools.reduce(
        jnp.logical_and, [jnp.broadcast_to(mask, shape) for mask in masks]
    )


def _read(ref, rows, columns, *leading):
    """A tile; zeros outside."""
    view, inside = _at(ref, rows, columns, *leading)
    return triton.load(view, mask=inside, other=None if inside is None else 0.0)


def _write(tile, ref, rows, columns, *leading):
    view, inside = _at(ref, rows, columns, *leading)
    triton.store(view, tile.astype(ref.dtype), mask=inside)


def _dot(a, b, *contracted):
    dtype = jnp.promote_types(a.dtype, b.dtype)
    dimensions = tuple((axis,) for axis in contracted), ((), ())
    return lax.dot_general(
        a.astype(dtype), b.astype(dtype), dimensions, preferred_element_type=jnp.float32
    )


def _by_rows(x_MD, w_EDF, sizes_E, contracted):
    """x @ w where axis 1 of w is `contracted`, x @ w.T where axis 2 is."""
    (rows, depth), groups, width = x_MD.shape, len(w_EDF), w_EDF.shape[3 - contracted]
    step = DEPTH_BYTES // x_MD.dtype.itemsize
    size = _columns(width)

    def kernel(x_ref, w_ref, group_ref, start_ref, end_ref, y_ref):
        columns = _tile_of(pl.program_id(0), size, width)
        block = pl.program_id(1)
        group = group_ref[block]
        own = _span(start_ref[block], ROWS, end_ref[block])

        def add(index, sum_RC):
            deep = _tile_of(index, step, depth)
            of_matrix = (deep, columns) if contracted == 1 else (columns, deep)
            return sum_RC + _dot(
                _read(x_ref, own, deep), _read(w_ref, *of_matrix, group), 1, contracted - 1
            )

        # Not `where`: of two literals Triton's lowering makes a boolean.
        steps = (group < groups).astype(jnp.int32) * pl.cdiv(depth, step)
        sum_RC = lax.fori_loop(0, steps, add, jnp.zeros((ROWS, size), jnp.float32))
        _write(sum_RC, y_ref, own, columns)

    table = _table(sizes_E, rows)
    grid = pl.cdiv(width, size), len(table[0])  # programs next to each other read the same rows
    return _call(kernel, "grouped_matmul", grid, _like(x_MD, (rows, width)), x_MD, w_EDF, *table)


def _table(sizes_E, rows):
    """(group, first row, end of its rows) of every block.

    As many as there can be, those left over past the end.
    """
    sizes_G = jnp.append(sizes_E, rows - jnp.sum(sizes_E)).astype(jnp.int32)
    ends_G = jnp.cumsum(sizes_G)
    blocks_G = pl.cdiv(sizes_G, ROWS)
    last_G = jnp.cumsum(blocks_G)
    blocks = jnp.arange(pl.cdiv(rows, ROWS) + len(sizes_E), dtype=jnp.int32)
    groups = jnp.minimum(jnp.sum(blocks[:, None] >= last_G, axis=1, dtype=jnp.int32), len(sizes_E))
    ends = ends_G[groups]
    return groups, ends - sizes_G[groups] + (blocks - (last_G - blocks_G)[groups]) * ROWS, ends


def _by_matrices(x_MD, dy_MF, w_EDF, sizes_E):
    """x.T @ dy of every group."""
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

        sum_RC = lax.fori_loop(
            0, pl.cdiv(end - start, step), add, jnp.zeros((ROWS, size), jnp.float32)
        )
        _write(sum_RC, dw_ref, deep, columns, group)

    ends_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    grid = pl.cdiv(width, size), pl.cdiv(depth, ROWS), groups
    return _call(
        kernel,
        "grouped_matmul_dw",
        grid,
        _like(w_EDF, w_EDF.shape),
        x_MD,
        dy_MF,
        ends_E - sizes_E,
        ends_E,
    )


def _like(leaf, shape):
    """Of the dtype of `leaf`, and varying over the same axes of a mesh."""
    return jax.eval_shape(lambda leaf: jnp.zeros_like(leaf, shape=shape), leaf)


def _call(kernel, name, grid, result, *operands):
    call = partial(pl.pallas_call, kernel, result, grid=grid, name=name, compiler_params=COMPILER)
    return lax.platform_dependent(*operands, cpu=call(interpret=True), default=call())
