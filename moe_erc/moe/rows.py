"""Assignments, of K experts to each of N tokens, as rows: sorted by expert, read and added up by index.

Row n K + k is the k-th expert of token n. An index out of range is nobody's: read as 0, dropped on
writing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def sort_by_expert(experts_NK: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """(rows ordered by expert, those of nobody here last; how many each expert has)."""
    experts_M = experts_NK.reshape(-1)
    keys_M = jnp.where((experts_M >= 0) & (experts_M < experts), experts_M, experts)
    order_M = _argsort(keys_M, experts + 1)
    ends_E = jnp.searchsorted(keys_M[order_M], jnp.arange(experts), side="right")
    return order_M, jnp.diff(ends_E, prepend=0).astype(jnp.int32)


def _argsort(keys_M, end):
    """Stable, of keys in [0, end).

    Key and place in one number sort six times as fast on a CPU as side by side.
    """
    count = len(keys_M)
    if end * count > jnp.iinfo(jnp.uint32).max:
        return jnp.argsort(keys_M, stable=True)
    places_M = jnp.arange(count, dtype=jnp.uint32)
    return (lax.sort(keys_M.astype(jnp.uint32) * count + places_M) % count).astype(jnp.int32)


def by_row(of_assignments: Any) -> Any:
    """(N, K, …) -> (N K, …), every leaf."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), of_assignments)


def take(tree: Any, indices: jax.Array) -> Any:
    """These rows of every leaf."""
    return jax.tree.map(lambda leaf: leaf.at[indices].get(mode="fill", fill_value=0), tree)


def add(totals: Any, indices: jax.Array, rows: Any) -> Any:
    """Every leaf with rows added to these."""
    return jax.tree.map(lambda total, leaf: total.at[indices].add(leaf, mode="drop"), totals, rows)
