"""Rows sorted by group times the matrix of their group, on TPU, by the megablox kernels of jax.

    y[m]  = x[m] @ w[g]
    dx[m] = dy[m] @ w[g].T
    dw[g] = sum over rows m of g of outer(x[m], dy[m])

`gmm` computes y and dx, `tgmm` computes dw. A kernel walks tiles of rows; a tile in which a group
ends is computed once for each group in it. On CPU the kernels are interpreted, slowly, for tests.

The kernels do not say over which axes of a mesh their results vary. Inside `jax.shard_map` they
need `check_vma=False`.
"""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

# Rows of a tile, and how many tiles a mean group fills at least. Large tiles use the matmul unit
# best; small ones waste least where groups end.
ROWS = (512, 256, 128)
TILES_OF_A_GROUP = 4
LANES = 128  # tiles of columns are multiples of it, or whole
# Bytes of the tiles of a kernel, each twice as the next one is read meanwhile, with float32 sums.
# By default a kernel may use 16 MiB; the rest is for its temporaries.
TILE_BYTES = 12 * 2**20


@jax.custom_vjp
def megablox_matmul(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """(M, F) in the dtype of x, accumulated in float32.

    Groups follow each other and may be empty. Rows behind the last group are unwritten: they may
    hold anything, also NaN, in the value and in the gradient of x. The gradient of w does not read
    them.
    """
    return _by_rows(x_MD, w_EDF, sizes_E, transposed=False)


def _forward(*inputs):
    return megablox_matmul(*inputs), inputs


def _backward(inputs, dy_MF):
    x_MD, w_EDF, sizes_E = inputs
    dx_MD = _by_rows(dy_MF, w_EDF, sizes_E, transposed=True)
    return dx_MD.astype(x_MD.dtype), _by_matrices(x_MD, dy_MF, w_EDF, sizes_E), None


megablox_matmul.defvjp(_forward, _backward)


def _by_rows(x_MD, w_EDF, sizes_E, transposed):
    """x @ w, or x @ w.T, of every group."""
    contracted = 2 if transposed else 1
    depth = w_EDF.shape[contracted]
    width = w_EDF.shape[3 - contracted]
    size = _rows_of_a_tile(len(x_MD), len(w_EDF))
    columns = tiles_of_rows(size, depth, width, x_MD.dtype.itemsize)
    multiply = partial(
        gmm,
        preferred_element_type=x_MD.dtype,
        tiling=(size, *columns),
        transpose_rhs=transposed,
    )
    return _call(multiply, _pad(x_MD, size), w_EDF, sizes_E)[: len(x_MD)]


def _by_matrices(x_MD, dy_MF, w_EDF, sizes_E):
    """x.T @ dy of every group, (E, D, F)."""
    groups, depth, width = w_EDF.shape
    size = _rows_of_a_tile(len(x_MD), groups)
    columns = tiles_of_matrices(size, depth, width, x_MD.dtype.itemsize)
    multiply = partial(tgmm, preferred_element_type=w_EDF.dtype, tiling=(size, *columns))
    # The kernel takes the transpose and turns it back.
    return _call(multiply, _pad(x_MD, size).T, _pad(dy_MF, size), sizes_E)


def _call(multiply, *operands):
    """The kernel's result; on CPU the kernel is interpreted."""
    return lax.platform_dependent(
        *operands, cpu=partial(multiply, interpret=True), default=multiply
    )


def _rows_of_a_tile(rows, groups):
    """The most rows of which a mean group fills `TILES_OF_A_GROUP` tiles.

    This holds on a mesh without an expert axis. With one, the rows are those of a whole expert
    group and the groups are the device's own experts, so a mean group fills fewer tiles.
    """
    for size in ROWS:
        if size * TILES_OF_A_GROUP * groups <= rows:
            return size
    return min(ROWS)


def _pad(rows, size):
    """Whole tiles of rows. The numbers of rows of real models need no more."""
    return jnp.pad(rows, ((0, -len(rows) % size), (0, 0)))


def tiles_of_rows(rows: int, depth: int, width: int, itemsize: int) -> tuple[int, int]:
    """(depth, width) of the tiles for y and dx: those that fit and read the fewest bytes.

    `width / tile` times every row is read. If a tile has not the whole depth, the matrix is read
    again for every tile of rows.
    """

    def cost(tile):
        deep, wide = tile
        again = depth * width / rows if deep < depth else 0
        return depth * width / wide + again

    def size(tile):
        deep, wide = tile
        return 2 * itemsize * (rows * deep + deep * wide + rows * wide) + 4 * rows * wide

    return _cheapest(depth, width, cost, size)


def tiles_of_matrices(rows: int, depth: int, width: int, itemsize: int) -> tuple[int, int]:
    """(depth, width) of the tiles for dw: those that fit and read the fewest bytes.

    Every tile of a matrix reads all rows of its group.
    """

    def cost(tile):
        deep, wide = tile
        return depth * width / wide + width * depth / deep

    def size(tile):
        deep, wide = tile
        return 2 * itemsize * (rows * (deep + wide) + deep * wide) + 4 * deep * wide

    return _cheapest(depth, width, cost, size)


def _cheapest(depth, width, cost, size):
    fitting = []
    for tile in product(_divisors(depth), _divisors(width)):
        if size(tile) <= TILE_BYTES:
            fitting.append(tile)

    def cheapest_then_largest(tile):
        deep, wide = tile
        return cost(tile), -deep * wide, -wide

    return min(fitting, key=cheapest_then_largest)


def _divisors(size):
    """What a tile may measure along an axis of `size`."""
    if size < LANES:
        return [size]
    # No multiple of LANES divides such an axis. The kernels mask what a last tile has too much.
    if size % LANES:
        return [size, LANES]
    return [tile for tile in range(LANES, size + 1, LANES) if size % tile == 0]
