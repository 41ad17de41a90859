"""The dropless expert layer as grouped matmuls over rows sorted by expert, for GPUs and TPUs.

Dispatch gathers the rows of the tokens in the order of their experts. Combine is a gather as well:
every token knows the places of its K rows and reads them, which takes one pass over memory and adds
in a fixed order, where a scatter-add needs atomic additions. Rows are cut into chunks only where
the arrays of one would pass `chunk_bytes`. Groups may be empty or cut by a chunk; nothing is padded
per expert or dropped, and chunks without rows are skipped. The backward keeps the inputs alone and
recomputes a chunk's hidden activations.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu

from moe_erc.moe import megablox_matmul
from moe_erc.moe.rows import by_row, sort_by_expert, take

# The most bytes of a chunk's widest array; about six such arrays live at a time. Every chunk adds
# the gradients of all experts into float32 once more, so fewer chunks are faster.
CHUNK_BYTES = 2**30
# On a TPU instead: this part of its memory.
CHUNKS_IN_MEMORY = 32
TILE = max(megablox_matmul.ROWS)  # rows; a multiple of the tiles of all kernels


class _Plan(NamedTuple):
    """Where rows go. R is the size of a chunk, C the number of chunks; C R >= M = N K."""

    # The assignment n K + k at every place; M, which is out of range, where there is none.
    rows_CR: jax.Array
    sizes_CE: jax.Array  # how many rows of a chunk each expert has
    places_NK: jax.Array  # the place of every assignment; C R where it is nobody's here


class _Chunk(NamedTuple):
    """The part of a plan that belongs to one chunk."""

    rows_R: jax.Array
    sizes_E: jax.Array
    places_NK: jax.Array  # within the chunk; R where the assignment lies in another


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def grouped(
    matmul: Callable,
    expert: Callable,
    x_ND: jax.Array,
    assigned: Any,
    experts_NK: jax.Array,
    matrices: Mapping,
) -> tuple[Any, Any]:
    """(summed by token, kept by assignment) of `expert` on its rows.

    The contract is in `experts.py`. `matmul(x_MD, w_EDF, sizes_E)` multiplies consecutive groups of
    rows, each with its matrix. What it gives for rows behind the last group is not read.
    """
    assigned_M = by_row(assigned)

    def of_chunk(chunk):
        product = partial(matmul, sizes_E=chunk.sizes_E)
        x_RD, assigned_R = _dispatch(chunk, x_ND, assigned_M)
        summed, kept = expert(x_RD, assigned_R, matrices, product)
        return _sum_by_token(chunk, summed), _by_assignment(chunk, kept)

    summed, kept = _over_chunks(of_chunk, _plan(x_ND, experts_NK, matrices))

    def in_dtype_of_x(leaf):
        return leaf.astype(x_ND.dtype)

    return jax.tree.map(in_dtype_of_x, summed), kept


def _forward(matmul, expert, *inputs):
    return grouped(matmul, expert, *inputs), inputs


def _backward(matmul, expert, inputs, gradients):
    # Without the barrier XLA may recognise what is recomputed, and keep it from the forward on.
    x_ND, assigned, experts_NK, matrices = lax.optimization_barrier(inputs)
    assigned_M = by_row(assigned)
    of_summed, of_kept = gradients
    of_kept_M = by_row(of_kept)

    def of_chunk(chunk):
        product = partial(matmul, sizes_E=chunk.sizes_E)
        x_RD, assigned_R = _dispatch(chunk, x_ND, assigned_M)

        def run(x_RD, assigned_R, matrices):
            return expert(x_RD, assigned_R, matrices, product)

        # The forward pass of the chunk again, now with what differentiates it.
        results, pull_back = jax.vjp(run, x_RD, assigned_R, matrices)
        of_results = _dispatch(chunk, of_summed, of_kept_M)
        dx_RD, dassigned_R, dmatrices = pull_back(jax.tree.map(_in_dtype_of, of_results, results))
        # Chunks are added up in float32.
        dmatrices = jax.tree.map(_in_float32, dmatrices)
        return _sum_by_token(chunk, dx_RD), _by_assignment(chunk, dassigned_R), dmatrices

    totals = _over_chunks(of_chunk, _plan(x_ND, experts_NK, matrices))
    dx_ND, dassigned, dmatrices = jax.tree.map(_in_dtype_of, totals, (x_ND, assigned, matrices))
    return dx_ND, dassigned, None, dmatrices


def _in_dtype_of(gradient, leaf):
    return gradient.astype(leaf.dtype)


def _in_float32(leaf):
    return leaf.astype(jnp.float32)


grouped.defvjp(_forward, _backward)


def chunk_bytes() -> int:
    """The most bytes of a chunk's widest array on the devices that are compiled for."""
    try:
        chip = tpu.get_tpu_info()
    except ValueError:  # not a TPU
        return CHUNK_BYTES
    return chip.hbm_capacity_bytes * chip.num_cores // CHUNKS_IN_MEMORY


def _plan(x_ND, experts_NK, matrices):
    """Sorts the assignments by expert and cuts them into chunks of one size."""
    experts, hidden_width, width = matrices["w_down"].shape
    assignments = experts_NK.size
    most = max(1, chunk_bytes() // (max(hidden_width, width) * x_ND.dtype.itemsize))
    # Several chunks are of whole tiles. Kernels would copy what is not, to fill up the last tile.
    tile = TILE if most >= TILE else 1
    most -= most % tile
    chunks = -(-assignments // most)
    size = -(-assignments // chunks)
    if chunks > 1:
        size += -size % tile
    order_M, sizes_E = sort_by_expert(experts_NK, experts)
    ends_E = jnp.cumsum(sizes_E)

    # The assignments that are an expert's here come first in the order. The places behind them hold
    # no row.
    places_M = jnp.arange(assignments, dtype=order_M.dtype)
    inside_M = places_M < ends_E[-1]
    rows_M = jnp.where(inside_M, order_M, assignments)
    rows_M = jnp.pad(rows_M, (0, chunks * size - assignments), constant_values=assignments)

    # The same table read backwards: from an assignment to its place.
    place_or_none_M = jnp.where(inside_M, places_M, chunks * size)
    place_of = jnp.zeros_like(order_M).at[order_M].set(place_or_none_M, unique_indices=True)

    # A chunk has of every group what lies between the chunk's first and last place.
    first_C1 = size * jnp.arange(chunks)[:, None]
    starts_CE = jnp.clip(ends_E - sizes_E - first_C1, 0, size)
    ends_CE = jnp.clip(ends_E - first_C1, 0, size)
    return _Plan(
        rows_CR=rows_M.reshape(chunks, size),
        sizes_CE=ends_CE - starts_CE,
        places_NK=place_of.reshape(experts_NK.shape),
    )


def _dispatch(chunk, of_tokens, of_assignments_M):
    """(rows of the tokens, rows of the assignments) in the order of the chunk.

    A place without an assignment has the last one's. No place is read back that has none, and zeros
    there would take another pass over memory.
    """
    experts_per_token = chunk.places_NK.shape[1]
    tokens_R = chunk.rows_R // experts_per_token

    def rows(tree, indices):
        def of_leaf(leaf):
            return leaf.at[indices].get(mode="clip")

        return jax.tree.map(of_leaf, tree)

    return rows(of_tokens, tokens_R), rows(of_assignments_M, chunk.rows_R)


def _sum_by_token(chunk, rows):
    """(R, …) -> (N, …) in float32: the sum of every token's rows."""

    def combine(leaf):
        # One slot at a time: where a compiler does not fuse gathers, an array of K rows per token
        # never exists.
        total = 0
        for k in range(chunk.places_NK.shape[1]):
            total += take(leaf, chunk.places_NK[:, k]).astype(jnp.float32)
        return total

    return jax.tree.map(combine, rows)


def _by_assignment(chunk, rows):
    """(R, …) -> (N, K, …)."""
    return take(rows, chunk.places_NK)


def _over_chunks(of_chunk, plan):
    """The sum over chunks of `of_chunk(chunk)`."""
    chunks, size = plan.rows_CR.shape
    if chunks == 1:
        return of_chunk(_Chunk(plan.rows_CR[0], plan.sizes_CE[0], plan.places_NK))

    def add_chunk(totals, numbered):
        number, rows_R, sizes_E = numbered
        places_NK = plan.places_NK - number * size
        elsewhere_NK = (places_NK < 0) | (places_NK >= size)
        chunk = _Chunk(rows_R, sizes_E, jnp.where(elsewhere_NK, size, places_NK))

        def add(totals):
            return jax.tree.map(jnp.add, totals, of_chunk(chunk))

        def skip(totals):
            return totals

        return lax.cond(jnp.any(sizes_E > 0), add, skip, totals), None

    def zeros(leaf):
        return jnp.zeros(leaf.shape, leaf.dtype)

    first = _Chunk(plan.rows_CR[0], plan.sizes_CE[0], plan.places_NK)
    start = jax.tree.map(zeros, jax.eval_shape(of_chunk, first))
    numbers = jnp.arange(chunks, dtype=plan.places_NK.dtype)
    totals, _ = lax.scan(add_chunk, start, (numbers, plan.rows_CR, plan.sizes_CE))
    return totals
