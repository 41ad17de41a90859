"""The dropless expert layer as one loop over blocks of rows, forward and backward; memory does not know the routing.

Assignments are sorted by expert. For each expert a loop with a dynamic trip count, ceil(count /
block), gathers a block of its rows from x by token, runs the expert on it and adds what is summed
by token. Nothing is padded per expert, an empty expert costs nothing, and no (N K, .) array exists
but those asked for. A dynamic trip count has no reverse mode, hence the custom one: it keeps the
inputs alone and recomputes a block's hidden activations.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.moe.rows import add, by_row, sort_by_expert, take

SMALLEST = 8
LARGEST = 128  # rows of a block
MATMUL = partial(jnp.matmul, preferred_element_type=jnp.float32)


def block_loop(
    expert: Callable, x_ND: jax.Array, assigned: Any, experts_NK: jax.Array, matrices: Mapping
) -> tuple[Any, Any]:
    """(summed by token, kept by assignment) of `expert` on its rows.

    See `experts.py` for the contract.
    """
    return _loop(expert, x_ND, assigned, experts_NK, _groups(experts_NK, matrices), matrices)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loop(expert, x_ND, assigned, experts_NK, sorted_rows, matrices):
    order_M, groups = sorted_rows
    assigned = by_row(assigned)
    size = _block_size(experts_NK, matrices)

    def one_expert(totals, group_and_matrices):
        group, of_expert = group_and_matrices

        def block(index, totals):
            rows, tokens = _block(order_M, group, index * size, size, experts_NK.shape)
            results = expert(take(x_ND, tokens), take(assigned, rows), of_expert, MATMUL)
            return tuple(map(add, totals, (tokens, rows), results))

        return lax.fori_loop(0, _blocks(group, size), block, totals), None

    of_expert = jax.tree.map(lambda leaf: leaf[0], matrices)
    summed, kept = jax.eval_shape(
        lambda *of: expert(*of, MATMUL), x_ND, take(assigned, jnp.arange(len(x_ND))), of_expert
    )

    def zeros(rows, dtype):
        return lambda leaf: jnp.zeros_like(x_ND, dtype or leaf.dtype, shape=(rows, *leaf.shape[1:]))

    totals = (
        jax.tree.map(zeros(len(x_ND), jnp.float32), summed),
        jax.tree.map(zeros(experts_NK.size, None), kept),
    )
    summed, kept = lax.scan(one_expert, totals, (groups, matrices))[0]
    kept = jax.tree.map(lambda leaf: leaf.reshape(*experts_NK.shape, *leaf.shape[1:]), kept)
    return jax.tree.map(lambda leaf: leaf.astype(x_ND.dtype), summed), kept


def _forward(expert, *inputs):
    return _loop(expert, *inputs), inputs


def _backward(expert, inputs, gradients):
    x_ND, assigned, experts_NK, (order_M, groups), matrices = inputs
    assigned = by_row(assigned)
    gradients = (gradients[0], by_row(gradients[1]))
    size = _block_size(experts_NK, matrices)

    def one_expert(of_rows, group_and_matrices):
        group, of_expert = group_and_matrices

        def block(index, totals):
            rows, tokens = _block(order_M, group, index * size, size, experts_NK.shape)
            results, pull_back = jax.vjp(
                lambda *of: expert(*of, MATMUL), take(x_ND, tokens), take(assigned, rows), of_expert
            )
            taken = tuple(map(take, gradients, (tokens, rows)))
            dx, dassigned, dmatrices = pull_back(
                jax.tree.map(lambda d, y: d.astype(y.dtype), taken, results)
            )
            dx_ND, dassigned_M, total = totals
            return (
                add(dx_ND, tokens, dx),
                add(dassigned_M, rows, dassigned),
                jax.tree.map(jnp.add, total, dmatrices),
            )

        start = (*of_rows, jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), of_expert))
        *of_rows, dmatrices = lax.fori_loop(0, _blocks(group, size), block, start)
        return tuple(of_rows), jax.tree.map(
            lambda d, leaf: d.astype(leaf.dtype), dmatrices, of_expert
        )

    start = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), (x_ND, assigned))
    (dx_ND, dassigned), dmatrices = lax.scan(one_expert, start, (groups, matrices))
    dassigned = jax.tree.map(
        lambda d, leaf: d.reshape(leaf.shape).astype(leaf.dtype), dassigned, inputs[1]
    )
    return dx_ND.astype(x_ND.dtype), dassigned, None, None, dmatrices


_loop.defvjp(_forward, _backward)


def _groups(experts_NK, matrices):
    """(rows ordered by expert, the (start, count) of each expert)."""
    order_M, counts_E = sort_by_expert(experts_NK, len(matrices["w_down"]))
    # Padded, so that the slice of a last, partial block never slides back over rows already done.
    return jnp.pad(order_M, (0, LARGEST)), (jnp.cumsum(counts_E) - counts_E, counts_E)


def _block_size(experts_NK, matrices):
    """A power of two near a quarter of a mean group: on a CPU large ones are faster, and half of a last one is idle."""
    quarter = experts_NK.size // (4 * len(matrices["w_down"]))
    return min(max((1 << quarter.bit_length()) // 2, SMALLEST), LARGEST)


def _blocks(group, size):
    return (group[1] + size - 1) // size


def _block(order_M, group, offset, size, shape_NK):
    """Assignment and token ids of a block.

    Past the group's end out of range: read as 0, dropped on writing.
    """
    start, count = group
    tokens, experts_per_token = shape_NK
    rows = lax.dynamic_slice_in_dim(order_M, start + offset, size)
    rows = jnp.where(offset + jnp.arange(size) < count, rows, tokens * experts_per_token)
    return rows, rows // experts_per_token
