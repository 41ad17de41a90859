"""Assignments of K experts to each of N tokens, as N K rows.

Row n K + k is the k-th expert of token n. Rows are sorted by expert, read by index and added up by
index. An index out of range is nobody's: it is read as 0, and dropped on writing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def sort_by_expert(experts_NK: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """(the ids of the rows, (N K,), ordered by expert; how many rows each expert has, (E,)).

    Rows of nobody here come last.
    """
    experts_M = experts_NK.reshape(-1)
    keys_M = jnp.where((experts_M >= 0) & (experts_M < experts), experts_M, experts)
    order_M = _argsort(keys_M, experts + 1)
    ends_E = jnp.searchsorted(keys_M[order_M], jnp.arange(experts), side="right")
    return order_M, jnp.diff(ends_E, prepend=0).astype(jnp.int32)


def _argsort(keys_M, end):
    """A stable argsort of keys in [0, end).

    Key and place are sorted as one number: on a CPU that is six times as fast as side by side.
    """
    count = len(keys_M)
    if end * count > jnp.iinfo(jnp.uint32).max:
        return jnp.argsort(keys_M, stable=True)
    places_M = jnp.arange(count, dtype=jnp.uint32)
    sorted_M = lax.sort(keys_M.astype(jnp.uint32) * count + places_M)
    return (sorted_M % count).astype(jnp.int32)


def by_row(of_assignments: Any) -> Any:
    """(N, K, …) -> (N K, …), every leaf."""

    def flatten(leaf):
        return leaf.reshape(-1, *leaf.shape[2:])

    return jax.tree.map(flatten, of_assignments)


def take(tree: Any, indices: jax.Array) -> Any:
    """The rows of every leaf that `indices` name."""

    def of_leaf(leaf):
        return leaf.at[indices].get(mode="fill", fill_value=0)

    return jax.tree.map(of_leaf, tree)


def add(totals: Any, indices: jax.Array, rows: Any) -> Any:
    """Every leaf of `totals` with `rows` added to its rows that `indices` name."""

    def to_leaf(total, leaf):
        return total.at[indices].add(leaf, mode="drop")

    return jax.tree.map(to_leaf, totals, rows)
