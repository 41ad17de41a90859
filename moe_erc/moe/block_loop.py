"""The dropless expert layer as one loop over blocks of rows, forward and backward.

Assignments are sorted by expert. For each expert a loop with a dynamic trip count, ceil(count /
block), gathers a block of its rows from x by token, runs the expert on it and adds what is summed
by token. Nothing is padded per expert, an empty expert takes no turn, and no (N K, .) array exists
except those that are kept. So memory does not depend on the routing.

JAX has no reverse mode for a dynamic trip count, hence the custom one. It keeps the inputs alone
and recomputes a block's hidden activations.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.moe.rows import add, by_row, sort_by_expert, take

# Rows of a block.
SMALLEST = 8
LARGEST = 128
MATMUL = partial(jnp.matmul, preferred_element_type=jnp.float32)


def block_loop(
    expert: Callable, x_ND: jax.Array, assigned: Any, experts_NK: jax.Array, matrices: Mapping
) -> tuple[Any, Any]:
    """(summed by token, kept by assignment) of `expert` on its rows.

    The contract is in `experts.py`.
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
            summed, kept = totals
            of_tokens, of_rows = expert(take(x_ND, tokens), take(assigned, rows), of_expert, MATMUL)
            return add(summed, tokens, of_tokens), add(kept, rows, of_rows)

        return lax.fori_loop(0, _blocks(group, size), block, totals), None

    totals = _empty_totals(expert, x_ND, assigned, experts_NK, matrices)
    (summed, kept), _ = lax.scan(one_expert, totals, (groups, matrices))

    def by_assignment(leaf):
        return leaf.reshape(*experts_NK.shape, *leaf.shape[1:])

    def in_dtype_of_x(leaf):
        return leaf.astype(x_ND.dtype)

    return jax.tree.map(in_dtype_of_x, summed), jax.tree.map(by_assignment, kept)


def _empty_totals(expert, x_ND, assigned, experts_NK, matrices):
    """Zeros of the shapes of (summed by token, kept by row)."""

    def run(x_ND, assigned, of_expert):
        return expert(x_ND, assigned, of_expert, MATMUL)

    def first(leaf):
        return leaf[0]

    # As many rows as there are tokens: `expert` wants as many of the one as of the other.
    rows = take(assigned, jnp.arange(len(x_ND)))
    summed, kept = jax.eval_shape(run, x_ND, rows, jax.tree.map(first, matrices))

    def of_tokens(leaf):
        return jnp.zeros((len(x_ND), *leaf.shape[1:]), jnp.float32)

    def of_rows(leaf):
        return jnp.zeros((experts_NK.size, *leaf.shape[1:]), leaf.dtype)

    return jax.tree.map(of_tokens, summed), jax.tree.map(of_rows, kept)


def _forward(expert, *inputs):
    return _loop(expert, *inputs), inputs


def _backward(expert, inputs, gradients):
    x_ND, assigned, experts_NK, (order_M, groups), matrices = inputs
    assigned_M = by_row(assigned)
    of_summed, of_kept = gradients
    of_kept_M = by_row(of_kept)
    size = _block_size(experts_NK, matrices)

    def run(x_RD, assigned_R, of_expert):
        return expert(x_RD, assigned_R, of_expert, MATMUL)

    def one_expert(of_rows, group_and_matrices):
        group, of_expert = group_and_matrices

        def block(index, totals):
            rows, tokens = _block(order_M, group, index * size, size, experts_NK.shape)
            # The forward pass of the block again, now with what differentiates it.
            results, pull_back = jax.vjp(run, take(x_ND, tokens), take(assigned_M, rows), of_expert)
            of_results = (take(of_summed, tokens), take(of_kept_M, rows))
            dx, dassigned, dmatrices = pull_back(jax.tree.map(_in_dtype_of, of_results, results))
            dx_ND, dassigned_M, total = totals
            return (
                add(dx_ND, tokens, dx),
                add(dassigned_M, rows, dassigned),
                jax.tree.map(jnp.add, total, dmatrices),
            )

        start = (*of_rows, jax.tree.map(_zeros, of_expert))
        *of_rows, dmatrices = lax.fori_loop(0, _blocks(group, size), block, start)
        return tuple(of_rows), jax.tree.map(_in_dtype_of, dmatrices, of_expert)

    start = jax.tree.map(_zeros, (x_ND, assigned_M))
    (dx_ND, dassigned_M), dmatrices = lax.scan(one_expert, start, (groups, matrices))

    def like(gradient, leaf):
        return gradient.reshape(leaf.shape).astype(leaf.dtype)

    dassigned = jax.tree.map(like, dassigned_M, assigned)
    return dx_ND.astype(x_ND.dtype), dassigned, None, None, dmatrices


def _zeros(leaf):
    """What gradients are summed into: float32, whatever the dtype of `leaf`."""
    return jnp.zeros_like(leaf, jnp.float32)


def _in_dtype_of(gradient, leaf):
    return gradient.astype(leaf.dtype)


_loop.defvjp(_forward, _backward)


def _groups(experts_NK, matrices):
    """(rows ordered by expert, the (start, count) of each expert)."""
    order_M, counts_E = sort_by_expert(experts_NK, len(matrices["w_down"]))
    starts_E = jnp.cumsum(counts_E) - counts_E
    # Padded, so that the slice of a last, partial block never slides back over rows already done.
    return jnp.pad(order_M, (0, LARGEST)), (starts_E, counts_E)


def _block_size(experts_NK, matrices):
    """A power of two near a quarter of a mean group.

    On a CPU large blocks are faster, and half of a group's last block is idle on average.
    """
    quarter = experts_NK.size // (4 * len(matrices["w_down"]))
    return min(max((1 << quarter.bit_length()) // 2, SMALLEST), LARGEST)


def _blocks(group, size):
    """How many blocks a group has."""
    return (group[1] + size - 1) // size


def _block(order_M, group, offset, size, shape_NK):
    """The ids of the assignments and of the tokens of a block.

    Past the group's end they are out of range: they are read as 0, and dropped on writing.
    """
    start, count = group
    tokens, experts_per_token = shape_NK
    rows = lax.dynamic_slice_in_dim(order_M, start + offset, size)
    rows = jnp.where(offset + jnp.arange(size) < count, rows, tokens * experts_per_token)
    return rows, rows // experts_per_token
