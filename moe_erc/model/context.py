"""Where tokens stand and what they attend to, where that is not simply: each in its place, to all before it.

    packed    several sequences in a row; padding, left or right, is a sequence of its own
    of_batch  the documents of a training or validation window, where attention stays within them
    branched  several sequences in a row that share their beginnings
    cached    the next T tokens of every row, which attend to the S slots of a key/value cache

Nobody attends to nothing: padding attends to padding, and no row of a softmax is empty.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Cache(NamedTuple):
    """Keys, turned by RoPE, and values of the tokens so far: of all layers, (L, …), or inside a layer its own."""

    key_BSHD: jax.Array
    value_BSHD: jax.Array


class Context(NamedTuple):
    """What attention is told beside the tokens: who attends to whom, token by token or by the sequences of a row.

    Sequences are compared where scores are made, a slice of queries at a time: of a long row no
    mask of (T, T) exists.
    """

    positions_BT: jax.Array  # below S; RoPE turns by them
    attends_BTS: jax.Array | None  # bool; S is T without a cache
    cache: Cache | None = None
    slot: Any = 0  # of the cache, where the keys and values of the T tokens go
    # Instead of attends_BTS: to one's own number, and to nothing behind.
    segments_BT: jax.Array | None = None

    @property
    def slots(self) -> int:
        """S, the keys there are."""
        return (self.segments_BT if self.attends_BTS is None else self.attends_BTS).shape[-1]

    def write(self, key_BTHD: jax.Array, value_BTHD: jax.Array) -> Cache:
        """The layer's cache with these in their slots."""
        new = Cache(key_BTHD, value_BTHD)
        return jax.tree.map(
            lambda old, leaf: lax.dynamic_update_slice_in_dim(old, leaf, self.slot, 1),
            self.cache,
            new,
        )


def packed(segments_BT: jax.Array) -> Context:
    """Context of sequences side by side: neighbours of one number are a sequence, whose positions start at 0.

    `segments_BT` holds integers or bools. A row may begin in the middle of a sequence: its
    positions start at 0 there. RoPE compares positions, so that where they start changes no score
    by more than its rounding.
    """
    slots_T = jnp.arange(segments_BT.shape[1])
    starts_BT = jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1]) != 0
    sequence_BT = jnp.cumsum(starts_BT, axis=1)
    first_BT = lax.cummax(jnp.where(starts_BT, slots_T, 0), axis=1)
    return Context(slots_T - first_BT, None, segments_BT=sequence_BT)


def of_batch(batch: Mapping) -> Context | None:
    """Context of a batch of `data/windows.py`: None, which attends to all before it, unless it numbers documents."""
    return packed(batch["segments_BT"]) if "segments_BT" in batch else None


def branched(positions_BT: jax.Array, trees_BT: jax.Array, branches_BT: jax.Array) -> Context:
    """Context of trees side by side: tokens see what is before them in their own branch and in branch 0, the trunk."""
    slots_T = jnp.arange(trees_BT.shape[1])
    seen_BTS = (branches_BT[:, None] == 0) | (branches_BT[..., None] == branches_BT[:, None])
    return Context(positions_BT, _attends(slots_T, trees_BT, trees_BT) & seen_BTS)


def cached(cache: Cache, first_B: jax.Array, slot: int | jax.Array, length: int) -> Context:
    """Context of the `length` tokens from `slot` on, in rows whose sequence begins at slot `first_B`."""
    slots_S = jnp.arange(cache.key_BSHD.shape[2])
    slots_T = slot + jnp.arange(length)
    inside_BS, inside_BT = (slots >= first_B[:, None] for slots in (slots_S, slots_T))
    positions_BT = jnp.maximum(slots_T - first_B[:, None], 0)
    return Context(positions_BT, _attends(slots_T, inside_BT, inside_BS), cache, slot)


def empty_cache(config: Any, rows: int, slots: int) -> Cache:
    """Of all layers, in the dtype of the model."""
    shape = config.layers, rows, slots, config.kv_heads, config.head_width
    return Cache(*(jnp.zeros(shape, config.dtype) for _ in Cache._fields))


def _attends(slots_T, sequence_BT, sequence_BS):
    """To the tokens of its own sequence that are not behind it."""
    slots_S = jnp.arange(sequence_BS.shape[1])
    return (slots_S <= slots_T[:, None]) & (sequence_BT[..., None] == sequence_BS[:, None])
