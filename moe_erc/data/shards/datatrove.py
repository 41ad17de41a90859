"""Shards of datatrove, which nanotron reads: NAME.ds, NAME.ds.index and NAME.ds.metadata.

    NAME.ds            raw little-endian tokens, uint16 or uint32
    NAME.ds.index      for each document, uint64: the tokens up to its end
    NAME.ds.metadata   text: TOKENIZER|BYTES PER TOKEN, number of tokens, that number in words

datatrove can be told to leave out the index or the metadata.
"""

import functools
import re

import numpy as np

from moe_erc.checks import BadInput
from moe_erc.data.shards.base import Ends, Format, Shard
from moe_erc.data.shards.storage import File, Storage

_DTYPES = {"2": np.dtype("<u2"), "4": np.dtype("<u4")}
_END = np.dtype("<u8")
_UNKNOWN = "Unknown Tokenizer"  # what datatrove writes if it was not told the name
_LONGEST_METADATA = 2**16  # bytes
_COUNT = re.compile(r"[0-9]{1,18}")


def open_shard(storage: Storage, file: File) -> Shard:
    """A `.ds` file with what lies beside it. BadInput if one of these files is cut off."""
    tokenizer, dtype = _metadata(storage, file)
    return Shard(file.path, 0, file.size, dtype, _ends(storage, file), tokenizer)


def _metadata(storage: Storage, file: File) -> tuple[str | None, np.dtype | None]:
    """(name of the tokenizer, type of the tokens), None for what is not said."""
    path = f"{file.path}.metadata"
    size = storage.size(path)
    if size is None:
        return None, None
    lines = storage.read(path, 0, min(size, _LONGEST_METADATA)).tobytes().decode(errors="replace")
    name, _, token_size = lines.partition("\n")[0].rpartition("|")
    count = lines.partition("\n")[2].partition("\n")[0]
    if token_size not in _DTYPES or not _COUNT.fullmatch(count):
        raise BadInput(
            f"data.sources: '{path}' does not give a tokenizer, 2 or 4 bytes per token and a "
            "number of tokens; copy it again, or delete it and set data.tokens.dtype"
        )
    dtype = _DTYPES[token_size]
    if int(count) * dtype.itemsize != file.size:
        raise BadInput(
            f"data.sources: '{file.path}' has {file.size:,} bytes, and its metadata says {count} "
            f"tokens of {token_size} bytes; it is cut off: copy it again"
        )
    return (None if name.startswith(_UNKNOWN) else name), dtype


def _ends(storage: Storage, file: File) -> Ends | None:
    path = f"{file.path}.index"
    size = storage.size(path)
    if size is None:
        return None
    if size % _END.itemsize:
        raise BadInput(
            f"data.sources: '{path}' has {size:,} bytes, which is no multiple of 8; "
            "it is cut off: copy it again"
        )
    read = functools.partial(_read, storage, path)
    count = size // _END.itemsize
    last = int(read(count - 1, count)[0]) if count else 0
    return Ends(count, last, read)


def _read(storage: Storage, path: str, first: int, stop: int) -> np.ndarray:
    data = storage.read(path, first * _END.itemsize, stop * _END.itemsize)
    return data.view(_END).astype(np.int64)


DATATROVE = Format("datatrove", ".ds", open_shard)
