"""From a pattern of token shards to token streams.

The shards of a source lie end to end in the order of their paths and are one stream: windows run
across the ends of shards, as they run across the ends of documents.

What is held out is never trained on: the shards that `data.tokens.validation` names, or the last
`data.validation_fraction` of every shard. The cut is a number of tokens, so that it does not depend
on the length of a window.

Opening reads a few bytes of every file and a sample of the tokens. The digest of a stream is of the
names and sizes of its shards and of that sample.
"""

import collections
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_erc.checks import BadInput
from moe_erc.data.config import DataConfig
from moe_erc.data.document import Account
from moe_erc.data.shards import PREFIX, is_pattern, storage
from moe_erc.data.shards.base import Format, Shard
from moe_erc.data.shards.formats import FORMATS
from moe_erc.data.shards.options import TokenOptions
from moe_erc.data.shards.storage import File, Storage
from moe_erc.data.shards.tokens import Piece, ShardTokens, WrongToken
from moe_erc.data.sources import label_of
from moe_erc.data.streams import Stream
from moe_erc.data.tokenizer import Tokenizer
from moe_erc.data.tokenizer import load as load_tokenizer

# Of files that tools write beside the tokens.
_BESIDE = (".index", ".metadata", ".loss", ".idx")
_WILDCARD = re.compile(r"[*?\[]")
_SAMPLES = 256  # reads of a stream when it is opened
_SAMPLE = 1024  # tokens of such a read


class Opened(NamedTuple):
    """What `open_shards` finds."""

    streams: list[tuple[str, str, Stream]]  # split, domain, stream
    account: Account


class _Group(NamedTuple):
    """The shards of one pattern, all of one format and one type of token."""

    pattern: str
    storage: Storage
    format: Format
    shards: list[Shard]
    dtype: np.dtype
    is_stated: bool  # whether the shards or the configuration say the type
    ignored: dict[str, int]


def open_shards(source: str, config: DataConfig, tokenizer: Tokenizer) -> Opened:
    """The streams of a source that is a pattern of shards.

    Raises:
      BadInput: if no shard matches, if shards are damaged or of several kinds, and if they were
        not made with `tokenizer`.
      ShardError: for a shard that cannot be read.
    """
    group = _open(source.removeprefix(PREFIX), config, tokenizer)
    held_out = _named_files(config.tokens)
    fraction = 0.0 if config.tokens.validation else config.validation_fraction
    kept = []
    tails = []
    for shard in group.shards:
        tokens = _count(shard, group.dtype)
        held = int(tokens * fraction)
        if shard.path not in held_out:
            kept.append(_piece(shard, 0, tokens - held))
            tails.append(_piece(shard, tokens - held, held))
    stream = functools.partial(_stream, source, config, tokenizer)
    found = []
    for split, pieces in (("train", kept), ("validation", tails)):
        # A stream of one token predicts nothing.
        if sum(piece.tokens for piece in pieces) > 1:
            found.append((split, "", stream(group, pieces)))
    splits = f"the last {100 * fraction:g} % of each are held out"
    if config.tokens.validation:
        named = len(group.shards) - len(kept)
        splits = f"what data.tokens.validation names is held out, {named:,} of these"
        # The first source has the named shards; they are no part of another.
        if source == next(filter(is_pattern, config.sources)):
            found += _named_streams(source, config, tokenizer, stream)
    what = f"{len(group.shards):,} {_noun(group.format, group.shards)} of {group.dtype}"
    counted = "" if _have_index(group.shards) else "; documents are counted in a sample"
    return Opened(found, Account(f"{what}: {splits}{counted}", group.ignored))


def describe(source: str) -> dict[str, int]:
    """{path below the fixed part of the pattern: bytes} of every shard of a source."""
    pattern = source.removeprefix(PREFIX)
    root = _root(pattern)
    files, _ = _shard_files(pattern)
    return {file.path.removeprefix(root): file.size for file in files}


def absolute(source: str) -> str:
    """A source whose pattern means the same from any directory; other sources as they are."""
    if not is_pattern(source):
        return source
    return PREFIX + storage.absolute(source.removeprefix(PREFIX))


def label(source: str) -> str:
    """A short name, of the directory or the file that a pattern of shards names."""
    pattern = storage.absolute(source.removeprefix(PREFIX))
    name = os.path.splitext(pattern)[0]
    if _WILDCARD.search(pattern):
        name = _root(pattern).rstrip("/")
    return label_of(name.rsplit("/", 1)[-1])


def _named_streams(
    source: str, config: DataConfig, tokenizer: Tokenizer, stream: Callable
) -> list[tuple[str, str, Stream]]:
    """The streams of the shards that are held out by name, a domain for each pattern."""
    found = []
    taken = set()
    for pattern in config.tokens.validation:
        group = _open(pattern, config, tokenizer)
        name = label(pattern)
        domain = "" if name == label(source) else name
        number = 2
        while domain in taken:
            domain = f"{name}_{number}"
            number = number + 1
        taken.add(domain)
        pieces = [_piece(shard, 0, _count(shard, group.dtype)) for shard in group.shards]
        if sum(piece.tokens for piece in pieces) < 2:
            raise BadInput(
                f"data.tokens.validation: the shards of {pattern!r} hold no two tokens; name others"
            )
        found.append(("validation", domain, stream(group, pieces)))
    return found


def _named_files(options: TokenOptions) -> set[str]:
    named = set()
    for pattern in options.validation:
        files, _ = _shard_files(pattern)
        named.update(file.path for file in files)
    return named


def _open(pattern: str, config: DataConfig, tokenizer: Tokenizer) -> _Group:
    """Open every shard of a pattern, and check that they go together."""
    files, ignored = _shard_files(pattern)
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
    return _Group(pattern, place, FORMATS[suffix], shards, dtype, is_stated, dict(ignored))


def _shard_files(pattern: str) -> tuple[list[File], collections.Counter]:
    """(the shards of a pattern, how many other files it finds by their suffix)."""
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


def _stream(
    source: str, config: DataConfig, tokenizer: Tokenizer, group: _Group, pieces: list[Piece]
) -> Stream:
    """The stream of some pieces, whose sample is checked."""
    tokens_N = ShardTokens(group.storage, group.dtype, pieces, tokenizer.vocab_size)
    places = _places(pieces)
    try:
        samples = storage.each(group.storage, lambda place: tokens_N[place[0] : place[1]], places)
    except WrongToken as error:
        raise BadInput(
            f"data.sources: '{error.filename}': {error.strerror}; set data.tokenizer to the "
            "tokenizer of the shards, or data.tokens.dtype to their type"
        ) from None
    if not group.is_stated:
        _check_halves(group, samples)
    sample_N = np.concatenate(samples)
    has_index = _have_index(group.shards) and not config.tokens.end_of_document
    end = int(config.tokens.end_of_document or tokenizer.eos_id)
    ends = tokens_N.ends if has_index else functools.partial(_closing, end)
    share = float(np.mean(sample_N == end))
    if has_index:
        total = sum(_count(shard, group.dtype) for shard in group.shards)
        share = sum(shard.ends.count for shard in group.shards) / max(total, 1)
    if not share and not config.attend_across_documents:
        raise BadInput(
            f"data.attend_across_documents: no token {end}, which ends a document, is among "
            f"{len(sample_N):,} of {group.pattern!r}; set data.tokens.end_of_document"
        )
    documents = round(share * len(tokens_N))
    digest = _digest(group, pieces, sample_N)
    return Stream(source, tokens_N, None, documents, digest, ends)


def _closing(end: int, first: int, tokens_N: np.ndarray) -> np.ndarray:
    """(N,) bool: whether each of the tokens from `first` on closes its document."""
    return tokens_N == end


def _check_halves(group: _Group, samples: Sequence[np.ndarray]) -> None:
    """Refuse tokens of 4 bytes that are read as pairs of 2, of which the second is always 0."""
    if group.dtype.itemsize != 2:
        return
    is_first_in_use = any(sample[0::2].any() for sample in samples)
    is_second_in_use = any(sample[1::2].any() for sample in samples)
    if is_first_in_use and not is_second_in_use:
        raise BadInput(
            f"data.tokens.dtype: every second token of {group.pattern!r} is 0 if it is uint16; "
            "set 'uint32', or 'uint16' if that is meant"
        )


def _places(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """Ranges of tokens to sample, spread over pieces and within them; each is in one piece.

    All begin an even number of tokens behind the start of a piece.
    """
    starts = np.cumsum([0, *(piece.tokens for piece in pieces)])
    filled = [number for number, piece in enumerate(pieces) if piece.tokens]
    per_piece = max(_SAMPLES // max(len(filled), 1), 1)
    places = []
    for turn in range(min(_SAMPLES, len(filled))):
        number = filled[turn * len(filled) // min(_SAMPLES, len(filled))]
        room = max(pieces[number].tokens - _SAMPLE, 0)
        for part in range(per_piece):
            # One sample of each of many pieces lies elsewhere in every piece.
            share = part / (per_piece - 1) if per_piece > 1 else turn / _SAMPLES
            first = int(starts[number]) + int(room * share) // 2 * 2
            places.append((first, min(first + _SAMPLE, int(starts[number + 1]))))
    return list(dict.fromkeys(places))


def _digest(group: _Group, pieces: Sequence[Piece], sample_N: np.ndarray) -> str:
    root = _root(group.pattern)
    listed = [[piece.path.removeprefix(root), piece.first, piece.tokens] for piece in pieces]
    digest = hashlib.sha256(json.dumps([group.dtype.str, listed]).encode())
    digest.update(sample_N.tobytes())
    return digest.hexdigest()


def _piece(shard: Shard, first: int, tokens: int) -> Piece:
    return Piece(shard.path, shard.start, first, tokens, shard.ends)


def _count(shard: Shard, dtype: np.dtype) -> int:
    return (shard.stop - shard.start) // dtype.itemsize


def _have_index(shards: Sequence[Shard]) -> bool:
    return all(shard.ends is not None for shard in shards)


def _noun(format_: Format, shards: Sequence[Shard]) -> str:
    return f"{format_.name} shard" + ("" if len(shards) == 1 else "s")


def _root(pattern: str) -> str:
    """The part of a pattern that stands before the names that differ, with its last slash.

    Of a pattern of one file that is its directory.
    """
    pattern = storage.absolute(pattern)
    fixed = _WILDCARD.split(pattern, maxsplit=1)[0]
    return fixed[: fixed.rfind("/") + 1]


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()
