"""Where tokens stand and what they attend to.

Without a context, token t of a row stands at position t and attends to all tokens before it. The
contexts for other cases are:

    packed    several sequences in a row; padding, left or right, is a sequence of its own
    of_batch  the documents of a training or validation window, where attention stays within them
    branched  several sequences in a row that share their beginnings
    cached    the next T tokens of every row, which attend to the S slots of a key/value cache

Every token attends to something: padding attends to padding, so no row of a softmax is empty.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Cache(NamedTuple):
    """Keys, turned by RoPE, and values of the tokens so far.

    Inside a layer they are the layer's own. Outside, both have a leading axis L of layers.
    """

    key_BSHD: jax.Array
    value_BSHD: jax.Array


class Context(NamedTuple):
    """Which token attends to which, token by token or by the sequences of a row.

    Sequences are compared where scores are made, a slice of queries at a time. A mask of (T, T)
    for a long row therefore never exists.
    """

    positions_BT: jax.Array  # below S; RoPE turns by them
    attends_BTS: jax.Array | None  # bool; S is T without a cache
    cache: Cache | None = None
    slot: Any = 0  # the first slot of the cache that the keys and values of the T tokens take
    # Instead of attends_BTS: a token attends to tokens of its own number, up to its own place.
    segments_BT: jax.Array | None = None

    @property
    def slots(self) -> int:
        """S, the keys there are."""
        mask = self.segments_BT if self.attends_BTS is None else self.attends_BTS
        return mask.shape[-1]

    def write(self, key_BTHD: jax.Array, value_BTHD: jax.Array) -> Cache:
        """The layer's cache with these keys and values in their slots."""
        key_BSHD, value_BSHD = self.cache
        return Cache(
            lax.dynamic_update_slice_in_dim(key_BSHD, key_BTHD, self.slot, 1),
            lax.dynamic_update_slice_in_dim(value_BSHD, value_BTHD, self.slot, 1),
        )


def packed(segments_BT: jax.Array) -> Context:
    """Context of sequences side by side: neighbours with the same number are one sequence.

    `segments_BT` holds integers or bools. The positions of a sequence start at 0, also where a row
    begins in the middle of one. RoPE compares positions, so the start changes a score by no more
    than its rounding.
    """
    slots_T = jnp.arange(segments_BT.shape[1])
    starts_BT = jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1]) != 0
    sequence_BT = jnp.cumsum(starts_BT, axis=1)
    first_BT = lax.cummax(jnp.where(starts_BT, slots_T, 0), axis=1)
    return Context(slots_T - first_BT, None, segments_BT=sequence_BT)


def of_batch(batch: Mapping) -> Context | None:
    """Context of a batch of `data/windows.py`.

    None, under which a token attends to all before it, unless the batch numbers its documents.
    """
    return packed(batch["segments_BT"]) if "segments_BT" in batch else None


def branched(positions_BT: jax.Array, trees_BT: jax.Array, branches_BT: jax.Array) -> Context:
    """Context of trees side by side, whose branches share a trunk.

    A token attends to what is before it in its own branch, and in branch 0, the trunk.
    """
    slots_T = jnp.arange(trees_BT.shape[1])
    is_trunk_B1S = branches_BT[:, None] == 0
    seen_BTS = is_trunk_B1S | (branches_BT[..., None] == branches_BT[:, None])
    return Context(positions_BT, _attends(slots_T, trees_BT, trees_BT) & seen_BTS)


def cached(cache: Cache, first_B: jax.Array, slot: int | jax.Array, length: int) -> Context:
    """Context of the `length` tokens from `slot` on.

    The sequence of a row begins at slot `first_B`; the slots before it are padding.
    """
    slots_S = jnp.arange(cache.key_BSHD.shape[2])
    slots_T = slot + jnp.arange(length)
    inside_BS = slots_S >= first_B[:, None]
    inside_BT = slots_T >= first_B[:, None]
    positions_BT = jnp.maximum(slots_T - first_B[:, None], 0)
    return Context(positions_BT, _attends(slots_T, inside_BT, inside_BS), cache, slot)


def empty_cache(config: Any, rows: int, slots: int) -> Cache:
    """A cache of zeros for all layers, in the dtype of the model."""
    shape = (config.layers, rows, slots, config.kv_heads, config.head_width)
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def _attends(slots_T, sequence_BT, sequence_BS):
    """(B, T, S): a token attends to its own sequence up to its own slot."""
    slots_S = jnp.arange(sequence_BS.shape[1])
    return (slots_S <= slots_T[:, None]) & (sequence_BT[..., None] == sequence_BS[:, None])
