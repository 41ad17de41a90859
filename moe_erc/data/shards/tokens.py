"""The tokens of many shards as one array, of which only the slices that are asked for are read."""

import bisect
import errno
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moe_erc.data.shards.base import Ends
from moe_erc.data.shards.storage import ShardError, Storage

_ENDS_PER_READ = 4096  # entries of an index that are read together, 32 KiB


class WrongToken(ShardError):
    """A shard that holds a token id which the tokenizer does not have."""


class Piece(NamedTuple):
    """A range of the tokens of one shard."""

    path: str
    offset: int  # bytes in front of the first token of the shard
    first: int  # token of the shard
    tokens: int
    ends: Ends | None


class ShardTokens:
    """Pieces of shards, end to end.

    It has a length and takes slices, as a memory map has. An id that the tokenizer does not have is
    refused where it is read, because a model would take another token for it.
    """

    def __init__(self, storage: Storage, dtype: np.dtype, pieces: Sequence[Piece], vocab_size: int):
        self.is_remote = storage.is_remote
        self._storage = storage
        self._dtype = dtype
        self._pieces = pieces
        self._vocab_size = vocab_size
        counts = np.array([piece.tokens for piece in pieces], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        first, stop, step = where.indices(len(self))
        if step != 1:
            raise IndexError(f"a slice of shards has step 1, not {step}")
        parts = [np.zeros(0, self._dtype)]
        for piece, low, high in self._parts(first, stop):
            parts.append(self._read(piece, low, high))
        return np.concatenate(parts)

    def ends(self, first: int, tokens_N: np.ndarray) -> np.ndarray:
        """(N,) bool: whether each of the tokens from `first` on is the last of its document.

        The index of each shard says it.
        """
        ends_N = np.zeros(len(tokens_N), bool)
        filled = 0
        for piece, low, high in self._parts(first, first + len(tokens_N)):
            for end in _ends_within(piece.ends, low, high):
                ends_N[filled + end - 1 - low] = True
            filled += high - low
        return ends_N

    def _parts(self, first: int, stop: int) -> Iterator[tuple[Piece, int, int]]:
        """The pieces of [first, stop), each with the range of tokens of its shard."""
        number = int(np.searchsorted(self._starts, first, side="right")) - 1
        while first < stop:
            piece = self._pieces[number]
            begin = int(self._starts[number])
            until = min(stop, int(self._starts[number + 1]))
            if first < until:
                yield piece, piece.first + first - begin, piece.first + until - begin
            first = max(first, until)
            number = number + 1

    def _read(self, piece: Piece, low: int, high: int) -> np.ndarray:
        size = self._dtype.itemsize
        data = self._storage.read(piece.path, piece.offset + low * size, piece.offset + high * size)
        ids_N = data.view(self._dtype)
        wrong = np.flatnonzero((ids_N < 0) | (ids_N >= self._vocab_size))
        if len(wrong):
            message = (
                f"token {low + wrong[0]:,} is id {ids_N[wrong[0]]}; "
                f"the tokenizer has the ids 0 to {self._vocab_size - 1}"
            )
            raise WrongToken(errno.EINVAL, message, piece.path)
        return ids_N


def _ends_within(ends: Ends, first: int, stop: int) -> Iterator[int]:
    """The ends of documents behind `first` and up to `stop`, in tokens of the shard."""
    blocks = range(0, ends.count, _ENDS_PER_READ)
    # The last block whose first end is not behind `first` is the earliest that can have one.
    behind = bisect.bisect_right(blocks, first, key=lambda at: int(ends.read(at, at + 1)[0]))
    for begin in blocks[max(behind - 1, 0) :]:
        block = ends.read(begin, min(begin + _ENDS_PER_READ, ends.count))
        yield from block[(block > first) & (block <= stop)].tolist()
        if block[-1] > stop:
            return
