"""From a pattern of token shards to token streams.

The shards of a source lie end to end in the order of their paths and are one stream: windows run
across the ends of shards, as they run across the ends of documents.

What is held out is never trained on: the shards that `data.tokens.validation` names, or the last
`data.validation_fraction` of every shard. The cut is a number of tokens, so that it does not depend
on the length of a window.

Opening reads a few bytes of every file and a sample of the tokens. The digest of a stream is of the
names and sizes of its shards and of that sample.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from moe_erc.checks import BadInput
from moe_erc.data.config import DataConfig
from moe_erc.data.document import Account
from moe_erc.data.shards import PREFIX, is_pattern, storage
from moe_erc.data.shards.base import Shard
from moe_erc.data.shards.group import Group, label, open_group, root_of, shard_files
from moe_erc.data.shards.options import TokenOptions
from moe_erc.data.shards.tokens import Piece, ShardTokens, WrongToken
from moe_erc.data.streams import Stream
from moe_erc.data.tokenizer import Tokenizer

_SAMPLES = 256  # reads of a stream when it is opened
_SAMPLE = 1024  # tokens of such a read


class Opened(NamedTuple):
    """What `open_shards` finds."""

    streams: list[tuple[str, str, Stream]]  # split, domain, stream
    account: Account


def open_shards(source: str, config: DataConfig, tokenizer: Tokenizer) -> Opened:
    """The streams of a source that is a pattern of shards.

    Raises:
      BadInput: if no shard matches, if shards are damaged or of several kinds, and if they were
        not made with `tokenizer`.
      ShardError: for a shard that cannot be read.
    """
    group = open_group(source.removeprefix(PREFIX), config, tokenizer)
    held_out = _named_files(config.tokens)
    fraction = 0.0 if config.tokens.validation else config.validation_fraction
    kept = []
    tails = []
    for shard in group.shards:
        tokens = group.count(shard)
        held = int(tokens * fraction)
        if _place(shard.path) not in held_out:
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
        patterns = [one for one in config.tokens.validation if _owner(one, config) == source]
        found += _named_streams(source, patterns, config, tokenizer, stream)
    counted = "" if group.has_index else "; documents are counted in a sample"
    return Opened(found, Account(f"{group}: {splits}{counted}", group.ignored))


def _owner(pattern: str, config: DataConfig) -> str:
    """The source that held-out shards are listed under: that of their label, else the first."""
    sources = list(filter(is_pattern, config.sources))
    for source in sources:
        if label(source) == label(pattern):
            return source
    return sources[0]


def _named_streams(
    source: str,
    patterns: Sequence[str],
    config: DataConfig,
    tokenizer: Tokenizer,
    stream: Callable,
) -> list[tuple[str, str, Stream]]:
    """The streams of the shards that are held out by name, a domain for each pattern."""
    found = []
    taken = set()
    for pattern in patterns:
        group = open_group(pattern, config, tokenizer)
        name = label(pattern)
        domain = "" if name == label(source) else name
        number = 2
        while domain in taken:
            domain = f"{name}_{number}"
            number = number + 1
        taken.add(domain)
        pieces = [_piece(shard, 0, group.count(shard)) for shard in group.shards]
        if sum(piece.tokens for piece in pieces) < 2:
            raise BadInput(
                f"data.tokens.validation: the shards of {pattern!r} hold no two tokens; name others"
            )
        found.append(("validation", domain, stream(group, pieces)))
    return found


def _named_files(options: TokenOptions) -> set[str]:
    """The places of all shards that are held out by name."""
    named = set()
    for pattern in options.validation:
        files, _ = shard_files(pattern)
        named.update(_place(file.path) for file in files)
    return named


def _place(path: str) -> str:
    """A path that is the same for all links to a local file."""
    return path if "://" in path else os.path.realpath(path)


def _stream(
    source: str, config: DataConfig, tokenizer: Tokenizer, group: Group, pieces: list[Piece]
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
    has_index = group.has_index and not config.tokens.end_of_document
    end = int(config.tokens.end_of_document or tokenizer.eos_id)
    ends = tokens_N.ends if has_index else functools.partial(_closing, end)
    share = float(np.mean(sample_N == end))
    if has_index:
        share = sum(shard.ends.count for shard in group.shards) / max(group.tokens, 1)
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


def _check_halves(group: Group, samples: Sequence[np.ndarray]) -> None:
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


def _digest(group: Group, pieces: Sequence[Piece], sample_N: np.ndarray) -> str:
    root = root_of(group.pattern)
    listed = [[piece.path.removeprefix(root), piece.first, piece.tokens] for piece in pieces]
    digest = hashlib.sha256(json.dumps([group.dtype.str, listed]).encode())
    digest.update(sample_N.tobytes())
    return digest.hexdigest()


def _piece(shard: Shard, first: int, tokens: int) -> Piece:
    return Piece(shard.path, shard.start, first, tokens, shard.ends)
