"""From a pattern to the shards that it finds, which must go together: one format, one type, whole.

A few bytes of every file are read, and no tokens.
"""

import collections
import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_erc.checks import BadInput
from moe_erc.data.config import DataConfig
from moe_erc.data.shards import PREFIX, is_pattern, storage
from moe_erc.data.shards.base import Format, Shard
from moe_erc.data.shards.formats import FORMATS
from moe_erc.data.shards.options import TokenOptions
from moe_erc.data.shards.storage import File, Storage
from moe_erc.data.sources import label_of
from moe_erc.data.split_names import split_word
from moe_erc.data.tokenizer import Tokenizer
from moe_erc.data.tokenizer import load as load_tokenizer

# Of files that tools write beside the tokens.
_BESIDE = (".index", ".metadata", ".loss", ".idx")
_WILDCARD = re.compile(r"[*?\[]")


class Group(NamedTuple):
    """The shards of one pattern, all of one format and one type of token."""

    pattern: str
    storage: Storage
    format: Format
    shards: list[Shard]
    dtype: np.dtype
    is_stated: bool  # whether the shards or the configuration say the type
    ignored: dict[str, int]

    @property
    def has_index(self) -> bool:
        """Whether every shard says where its documents end."""
        return all(shard.ends is not None for shard in self.shards)

    @property
    def tokens(self) -> int:
        """The tokens of all shards."""
        return sum(self.count(shard) for shard in self.shards)

    def count(self, shard: Shard) -> int:
        """The tokens of one shard."""
        return (shard.stop - shard.start) // self.dtype.itemsize

    def __str__(self) -> str:
        ending = "" if len(self.shards) == 1 else "s"
        return f"{len(self.shards):,} {self.format.name} shard{ending} of {self.dtype}"


def open_group(pattern: str, config: DataConfig, tokenizer: Tokenizer) -> Group:
    """Open every shard of a pattern, and check that they go together.

    Raises:
      BadInput: if no shard matches, if shards are damaged or of several kinds, and if they were
        not made with `tokenizer`.
      ShardError: for a shard that cannot be read.
    """
    files, ignored = shard_files(pattern)
    if not files:
        raise BadInput(_none_found(pattern, ignored))
    formats = {_suffix(file.path) for file in files}
    if len(formats) > 1:
        raise BadInput(
            f"data.sources: {pattern!r} finds files of several formats, "
            f"{', '.join(sorted(formats))}; name one of them, as '*{min(formats)}'"
        )
    [suffix] = formats
    place = storage.of(pattern)
    shards = storage.each(place, functools.partial(FORMATS[suffix].open, place), files)
    dtype, is_stated = _token_type(shards, config.tokens, tokenizer)
    for shard in shards:
        _check_size(shard, dtype)
    _check_tokenizer(shards, config, tokenizer)
    return Group(pattern, place, FORMATS[suffix], shards, dtype, is_stated, dict(ignored))


def shard_files(pattern: str) -> tuple[list[File], collections.Counter]:
    """(the files of tokens that a pattern finds, how many other files it finds by their suffix)."""
    files = []
    ignored: collections.Counter[str] = collections.Counter()
    for file in storage.of(pattern).find(pattern):
        suffix = _suffix(file.path)
        if suffix in FORMATS:
            files.append(file)
        elif suffix not in _BESIDE:
            ignored[f"{suffix!r} files" if suffix else "files without suffix"] += 1
    return files, ignored


def _none_found(pattern: str, ignored: Mapping[str, int]) -> str:
    known = ", ".join(FORMATS)
    found = ", ".join(f"{count:,} {what}" for what, count in ignored.items())
    if found:
        found = f" (it finds {found})"
    mend = f"name files that end in {known}"
    if not _WILDCARD.search(pattern):
        mend += f", as 'tokens:{pattern.rstrip('/')}/*.npy' for those of a directory"
    return f"data.sources: no token shard matches {pattern!r}{found}; {mend}"


def _token_type(
    shards: Sequence[Shard], options: TokenOptions, tokenizer: Tokenizer
) -> tuple[np.dtype, bool]:
    """(the type of the tokens of all shards, whether it is stated).

    BadInput if shards, or the configuration, say different types.
    """
    first = shards[0]
    for shard in shards:
        if shard.dtype != first.dtype:
            raise BadInput(
                f"data.sources: the tokens of '{first.path}' are {first.dtype or 'of no type'}, "
                f"those of '{shard.path}' {shard.dtype or 'of no type'}; "
                "name shards of one type, or two sources"
            )
    if first.dtype is None:
        fits = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        asked = np.dtype(options.dtype or fits).newbyteorder("<")
        return asked, bool(options.dtype)
    if options.dtype and first.dtype.itemsize != np.dtype(options.dtype).itemsize:
        raise BadInput(
            f"data.tokens.dtype: {options.dtype!r}, but '{first.path}' says {first.dtype}; "
            "leave the key out"
        )
    return first.dtype, True


def _check_size(shard: Shard, dtype: np.dtype) -> None:
    size = shard.stop - shard.start
    if size % dtype.itemsize:
        raise BadInput(
            f"data.sources: '{shard.path}' has {size:,} bytes of tokens, which is no multiple of "
            f"{dtype.itemsize} ({dtype}); it is cut off, or data.tokens.dtype is another"
        )
    if shard.ends and shard.ends.last != size // dtype.itemsize:
        raise BadInput(
            f"data.sources: '{shard.path}' holds {size // dtype.itemsize:,} tokens, and its index "
            f"says {shard.ends.last:,}; one of the two is cut off: copy both again"
        )


def _check_tokenizer(shards: Sequence[Shard], config: DataConfig, tokenizer: Tokenizer) -> None:
    """Refuse shards that say that they were made with another tokenizer than the run's."""
    names = {shard.tokenizer: shard.path for shard in shards if shard.tokenizer}
    accepted = (config.tokenizer, config.tokens.tokenizer)
    for name, path in names.items():
        if name not in accepted and not _is_file_of(name, tokenizer):
            raise BadInput(
                f"data.tokenizer: '{path}' was made with the tokenizer {name!r}, "
                f"and data.tokenizer is {config.tokenizer!r}; give the tokenizer.json of that one; "
                f"if it is that one, say so with data.tokens.tokenizer={name!r}"
            )


def _is_file_of(name: str, tokenizer: Tokenizer) -> bool:
    """Whether `name` is a path of this machine where the same tokenizer lies."""
    for path in (name, os.path.join(name, "tokenizer.json")):
        if os.path.isfile(path):
            try:
                return load_tokenizer(path).identity == tokenizer.identity
            except BadInput:
                return False
    return False


def describe(source: str) -> dict[str, int]:
    """{path below the fixed part of the pattern: bytes} of every shard of a source."""
    pattern = source.removeprefix(PREFIX)
    root = root_of(pattern)
    files, _ = shard_files(pattern)
    return {file.path.removeprefix(root): file.size for file in files}


def absolute(source: str) -> str:
    """A source whose pattern means the same from any directory; other sources as they are."""
    if not is_pattern(source):
        return source
    return PREFIX + storage.absolute(source.removeprefix(PREFIX))


def label(source: str) -> str:
    """A short name, of the directory or the file that a pattern of shards names.

    Directories that are named after a split are passed over: c4/train/*.ds and c4/val/*.ds are c4.
    """
    pattern = storage.absolute(source.removeprefix(PREFIX))
    if not _WILDCARD.search(pattern):
        return label_of(os.path.splitext(os.path.basename(pattern))[0])
    names = root_of(pattern).strip("/").split("/")
    told = [name for name in names if not split_word(name)]
    return label_of((told or names)[-1])


def root_of(pattern: str) -> str:
    """The part of a pattern that stands before the names that differ, with its last slash.

    Of a pattern of one file that is its directory.
    """
    pattern = storage.absolute(pattern)
    fixed = _WILDCARD.split(pattern, maxsplit=1)[0]
    return fixed[: fixed.rfind("/") + 1]


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()
