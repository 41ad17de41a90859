"""Shards of Megatron-LM: NAME.bin with the tokens, and NAME.idx, which describes them.

    NAME.idx   b"MMIDIDX\\0\\0", uint64 version 1, uint8 code of the type of a token,
               uint64 n sequences, uint64 m boundaries of documents,
               n int32 tokens of a sequence, n int64 first byte of a sequence,
               m int64 sequences before a boundary, n int8 modes (multimodal files alone)

The first boundary is 0; every other one ends a document.
"""

import dataclasses
import errno
import functools
import struct

import numpy as np

from moe_erc.checks import BadInput
from moe_erc.data.shards.base import Ends, Format, Shard
from moe_erc.data.shards.storage import File, ShardError, Storage

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {code: np.dtype(name) for code, name in ((1, "<u1"), (4, "<i4"), (5, "<i8"), (8, "<u2"))}
_LENGTH = np.dtype("<i4")
_PLACE = np.dtype("<i8")


@dataclasses.dataclass(frozen=True, slots=True)
class _Index:
    """An index file: where its tables begin, in bytes, and what they describe."""

    storage: Storage
    path: str
    sequences: int
    boundaries: int
    dtype: np.dtype

    @property
    def pointers(self) -> int:
        return _HEADER.size + self.sequences * _LENGTH.itemsize

    @property
    def documents(self) -> int:
        return self.pointers + self.sequences * _PLACE.itemsize

    @property
    def size(self) -> int:
        """The least size of the file in bytes."""
        return self.documents + self.boundaries * _PLACE.itemsize

    def places(self, table: int, first: int, stop: int) -> np.ndarray:
        """The entries [first, stop) of a table of int64 that begins at byte `table`."""
        size = _PLACE.itemsize
        return self.storage.read(self.path, table + first * size, table + stop * size).view(_PLACE)

    def tokens(self) -> int:
        """The tokens up to the end of the last sequence."""
        if not self.sequences:
            return 0
        pointer = self.places(self.pointers, self.sequences - 1, self.sequences)[0]
        length = self.storage.read(self.path, self.pointers - _LENGTH.itemsize, self.pointers)
        return int(pointer) // self.dtype.itemsize + int(length.view(_LENGTH)[0])

    def ends(self, total: int, first: int, stop: int) -> np.ndarray:
        """For each document of [first, stop), the tokens up to its end, of `total` in all."""
        behind = self.places(self.documents, first + 1, stop + 1)
        if behind[0] < 0 or (np.diff(behind) < 0).any():
            raise ShardError(errno.EINVAL, "has documents that are out of order", self.path)
        ends = np.full(len(behind), total, np.int64)
        inner = behind < self.sequences
        # The sequence behind a document begins where the document ends.
        if inner.any():
            low = int(behind[0])
            pointers = self.places(self.pointers, low, int(behind[inner][-1]) + 1)
            ends[inner] = pointers[behind[inner] - low] // self.dtype.itemsize
        return ends


def open_shard(storage: Storage, file: File) -> Shard:
    """A `.bin` file with its `.idx`.

    BadInput if the index is missing, cut off or of another kind.
    """
    path = file.path.removesuffix(".bin") + ".idx"
    size = storage.size(path)
    if size is None:
        raise BadInput(
            f"data.sources: '{file.path}' has no index '{path}' beside it; add it, "
            "or name the file .npy if it is a flat array"
        )
    head = storage.read(path, 0, min(size, _HEADER.size)).tobytes()
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise BadInput(f"data.sources: '{path}' is no index of Megatron-LM; copy it again")
    _, version, code, sequences, boundaries = _HEADER.unpack(head)
    if version != 1 or code not in _DTYPES:
        raise BadInput(
            f"data.sources: '{path}' has version {version} and type {code}; version 1 and "
            f"the types {', '.join(map(str, _DTYPES))} (integers) are read: write it again"
        )
    index = _Index(storage, path, sequences, boundaries, _DTYPES[code])
    if size not in (index.size, index.size + sequences):
        raise BadInput(
            f"data.sources: '{path}' has {size:,} bytes, and {sequences:,} sequences in "
            f"{boundaries:,} boundaries need {index.size:,}; it is cut off: copy it again"
        )
    total = index.tokens()
    if (
        boundaries
        and int(index.places(index.documents, boundaries - 1, boundaries)[0]) != sequences
    ):
        raise BadInput(
            f"data.sources: '{path}' says that its documents do not hold its {sequences:,} "
            "sequences; copy it again"
        )
    documents = max(boundaries - 1, 0)
    ends = Ends(documents, total, functools.partial(index.ends, total))
    return Shard(file.path, 0, file.size, index.dtype, ends, None)


MEGATRON = Format("Megatron-LM", ".bin", open_shard)
