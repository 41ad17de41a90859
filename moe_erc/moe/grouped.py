"""The dropless expert layer as grouped matmuls over chunks of rows; for backends that have such a matmul.

Assignments are sorted by expert and cut into chunks of at most E D rows, so that the hidden activations of one,
(E D, F), are never larger than the experts' own matrices, however many tokens there are. Groups may be empty or cut by
a chunk; nothing is padded per expert or dropped, and chunks of rows that belong to no expert here are skipped. The
backward keeps the inputs alone and recomputes a chunk's hidden activations.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.moe.rows import add, by_row, sort_by_expert, take


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def grouped(matmul, expert, x_ND, assigned, experts_NK, matrices):
    """(summed by token, kept by assignment) of `expert` on its rows; see `experts.py` for the contract.

    `matmul(x_MD, w_EDF, sizes_E)` multiplies consecutive groups of rows, each with its matrix.
    """
    assigned = by_row(assigned)

    def results(tokens, rows, sizes_E):
        product = partial(matmul, sizes_E=sizes_E)
        return expert(take(x_ND, tokens), take(assigned, rows), matrices, product)

    def add_chunk(totals, tokens, rows, sizes_E):
        return tuple(map(add, totals, (tokens, rows), results(tokens, rows, sizes_E)))

    def zeros(rows, dtype):
        return lambda leaf: jnp.zeros_like(x_ND, dtype or leaf.dtype, shape=(rows, *leaf.shape[1:]))

    summed, kept = jax.eval_shape(results, *_first(_chunks(experts_NK, matrices)))
    totals = jax.tree.map(zeros(len(x_ND), jnp.float32), summed), jax.tree.map(zeros(experts_NK.size, None), kept)
    summed, kept = _over_chunks(add_chunk, totals, experts_NK, matrices)
    kept = jax.tree.map(lambda leaf: leaf.reshape(*experts_NK.shape, *leaf.shape[1:]), kept)
    return jax.tree.map(lambda leaf: leaf.astype(x_ND.dtype), summed), kept


def _forward(matmul, expert, *inputs):
    return grouped(matmul, expert, *inputs), inputs


def _backward(matmul, expert, inputs, gradients):
    # Else XLA may recognise what is recomputed, and keep it from the forward on.
    x_ND, assigned, experts_NK, matrices = lax.optimization_barrier(inputs)
    assigned, gradients = by_row(assigned), (gradients[0], by_row(gradients[1]))

    def add_chunk(totals, tokens, rows, sizes_E):
        product = partial(matmul, sizes_E=sizes_E)
        taken = take(x_ND, tokens), take(assigned, rows), matrices
        results, pull_back = jax.vjp(lambda *of: expert(*of, product), *taken)
        of_results = tuple(map(take, gradients, (tokens, rows)))
        dx, dassigned, dmatrices = pull_back(jax.tree.map(lambda d, y: d.astype(y.dtype), of_results, results))
        dx_ND, dassigned_M, total = totals
        return add(dx_ND, tokens, dx), add(dassigned_M, rows, dassigned), jax.tree.map(jnp.add, total, dmatrices)

    inputs = x_ND, assigned, matrices
    totals = _over_chunks(
        add_chunk, jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), inputs), experts_NK, matrices
    )
    dx_ND, dassigned, dmatrices = jax.tree.map(lambda d, leaf: d.astype(leaf.dtype), totals, inputs)
    dassigned = jax.tree.map(lambda d: d.reshape(*experts_NK.shape, *d.shape[1:]), dassigned)
    return dx_ND, dassigned, None, dmatrices


grouped.defvjp(_forward, _backward)


def _over_chunks(add_chunk, totals, experts_NK, matrices):
    """`add_chunk(totals, tokens, rows, sizes_E) -> totals` of every chunk that has rows, one after the other."""
    chunks = _chunks(experts_NK, matrices)
    if len(chunks[0]) == 1:  # without a loop XLA sees that the totals begin as zeros, and stores none
        return add_chunk(totals, *_first(chunks))

    def chunk(totals, of_chunk):
        filled = jnp.any(of_chunk[-1] > 0)
        return lax.cond(filled, lambda totals: add_chunk(totals, *of_chunk), lambda totals: totals, totals), None

    return lax.scan(chunk, totals, chunks)[0]


def _chunks(experts_NK, matrices):
    """(token ids, assignment ids n K + k, sizes of the groups) of every chunk of rows, sorted by expert.

    Ids of rows that are nobody's here, last, are out of range: read as 0, dropped on writing.
    """
    experts, _, width = matrices["w_down"].shape
    assignments, experts_per_token = experts_NK.size, experts_NK.shape[-1]
    chunks = -(-assignments // (experts * width))
    size = -(-assignments // chunks)
    order_M, sizes_E = sort_by_expert(experts_NK, experts)
    ends_E = jnp.cumsum(sizes_E)
    order_M = jnp.where(jnp.arange(assignments) < ends_E[-1], order_M, assignments)
    rows_CR = jnp.pad(order_M, (0, chunks * size - assignments), constant_values=assignments).reshape(chunks, size)
    first_C1 = size * jnp.arange(chunks)[:, None]
    ends_CE, starts_CE = (jnp.clip(bounds - first_C1, 0, size) for bounds in (ends_E, ends_E - sizes_E))
    return rows_CR // experts_per_token, rows_CR, ends_CE - starts_CE


def _first(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree)
