"""What a format of token shards is, and what it says of a shard."""

import dataclasses
from collections.abc import Callable

import numpy as np

from moe_erc.data.shards.storage import File, Storage


@dataclasses.dataclass(frozen=True, slots=True)
class Ends:
    """Where the documents of a shard end, as its index says."""

    count: int  # of documents
    last: int  # tokens before the end of the last document
    # (first, last + 1) of some documents -> for each, the tokens of the shard up to its end, int64
    read: Callable[[int, int], np.ndarray]


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """One file of tokens, end to end. None stands for what its format does not say."""

    path: str
    start: int  # the first byte of the first token
    stop: int  # the byte behind the last token
    dtype: np.dtype | None  # of the tokens
    ends: Ends | None
    tokenizer: str | None  # the name or path that its maker gave


@dataclasses.dataclass(frozen=True)
class Format:
    """A format: how its files are recognised, and how one is opened.

    `open` reads a few bytes of a file and of the files beside it, never the tokens. BadInput for a
    file that is not of the format.
    """

    name: str
    suffix: str  # of the files that hold the tokens
    open: Callable[[Storage, File], Shard]
