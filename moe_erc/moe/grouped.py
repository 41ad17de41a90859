"""The dropless expert layer as grouped matmuls over rows sorted by expert, for GPUs and TPUs.

Dispatch gathers the rows of the tokens in the order of their experts. Combine is a gather as well:
every token knows the places of its K rows and reads them, which takes one pass over memory and adds
in a fixed order, where a scatter-add needs atomic additions. Rows are cut into chunks only where
the arrays of one would pass `CHUNK_BYTES`. Groups may be empty or cut by a chunk; nothing is padded
per expert or dropped, and chunks without rows are skipped. The backward keeps the inputs alone and
recomputes a chunk's hidden activations.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.moe.rows import by_row, sort_by_expert, take

# Of the widest array of a chunk. Every chunk adds gradients of all experts into float32 once more,
# so fewer are faster; about six such arrays live at a time.
CHUNK_BYTES = 2**30


class _Plan(NamedTuple):
    """Where rows go. R is the size of a chunk, C the number of chunks; C R >= M = N K."""

    # Assignment n K + k of every place; M, which is out of range, where there is none.
    rows_CR: jax.Array
    sizes_CE: jax.Array  # how many rows of a chunk each expert has
    places_NK: jax.Array  # the place of every assignment; C R where it is nobody's here


class _Chunk(NamedTuple):
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
    """(summed by token, kept by assignment) of `expert` on its rows; see `experts.py` for the contract.

    `matmul(x_MD, w_EDF, sizes_E)` multiplies consecutive groups of rows, each with its matrix.
    """
    assigned_M = by_row(assigned)

    def of_chunk(chunk):
        product = partial(matmul, sizes_E=chunk.sizes_E)
        summed, kept = expert(*_dispatch(chunk, x_ND, assigned_M), matrices, product)
        return _sum_by_token(chunk, summed), _by_assignment(chunk, kept)

    summed, kept = _over_chunks(of_chunk, _plan(x_ND, experts_NK, matrices))
    return jax.tree.map(lambda leaf: leaf.astype(x_ND.dtype), summed), kept


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
        results, pull_back = jax.vjp(lambda *of: expert(*of, product), x_RD, assigned_R, matrices)
        of_results = _dispatch(chunk, of_summed, of_kept_M)
        of_results = jax.tree.map(lambda d, y: d.astype(y.dtype), of_results, results)
        dx_RD, dassigned_R, dmatrices = pull_back(of_results)
        dmatrices = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float32), dmatrices
        )  # added up over chunks
        return _sum_by_token(chunk, dx_RD), _by_assignment(chunk, dassigned_R), dmatrices

    plan = _plan(x_ND, experts_NK, matrices)
    totals = _over_chunks(of_chunk, plan)
    dx_ND, dassigned, dmatrices = jax.tree.map(
        lambda d, leaf: d.astype(leaf.dtype), totals, (x_ND, assigned, matrices)
    )
    return dx_ND, dassigned, None, dmatrices


grouped.defvjp(_forward, _backward)


def _plan(x_ND, experts_NK, matrices):
    experts, hidden_width, width = matrices["w_down"].shape
    assignments = experts_NK.size
    most = max(1, CHUNK_BYTES // (max(hidden_width, width) * x_ND.dtype.itemsize))
    chunks = -(-assignments // most)
    size = -(-assignments // chunks)
    order_M, sizes_E = sort_by_expert(experts_NK, experts)
    ends_E = jnp.cumsum(sizes_E)
    places_M = jnp.arange(assignments, dtype=order_M.dtype)
    inside_M = places_M < ends_E[-1]
    rows_M = jnp.where(inside_M, order_M, assignments)
    rows_CR = jnp.pad(rows_M, (0, chunks * size - assignments), constant_values=assignments)
    place_of_M = (
        jnp.zeros_like(order_M)
        .at[order_M]
        .set(jnp.where(inside_M, places_M, chunks * size), unique_indices=True)
    )
    first_C1 = size * jnp.arange(chunks)[:, None]
    starts_CE = jnp.clip(ends_E - sizes_E - first_C1, 0, size)
    ends_CE = jnp.clip(ends_E - first_C1, 0, size)
    return _Plan(
        rows_CR.reshape(chunks, size), ends_CE - starts_CE, place_of_M.reshape(experts_NK.shape)
    )


def _dispatch(chunk, of_tokens, of_assignments_M):
    """Rows of the chunk: those of the tokens, and those of the assignments."""
    experts_per_token = chunk.places_NK.shape[1]
    return take(of_tokens, chunk.rows_R // experts_per_token), take(of_assignments_M, chunk.rows_R)


def _sum_by_token(chunk, rows):
    """(R, …) -> (N, …) in float32: the sum of every token's rows."""

    def combine(leaf):
        # One by one: where a compiler does not fuse gathers, no array of K rows per token exists.
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
            return jax.tree.map(lambda total, leaf: total + leaf, totals, of_chunk(chunk))

        return lax.cond(jnp.any(sizes_E > 0), add, lambda totals: totals, totals), None

    first = _Chunk(plan.rows_CR[0], plan.sizes_CE[0], plan.places_NK)
    shapes = jax.eval_shape(of_chunk, first)
    totals = jax.tree.map(
        lambda leaf: jnp.zeros_like(plan.places_NK, leaf.dtype, shape=leaf.shape), shapes
    )
    numbered = (jnp.arange(chunks, dtype=plan.places_NK.dtype), plan.rows_CR, plan.sizes_CE)
    return lax.scan(add_chunk, totals, numbered)[0]
