"""From `config.data` to batches: the part of this package that scripts use.

    corpus = prepare(DataConfig(**config.data))
    for line in describe(corpus, sequence_length, windows): print(line)
    for batch in train_batches(corpus, sequence_length, batch_size, seed, start_row=start_row): ...

Text is tokenised once and then opened from the cache. Token shards are read where they lie. A batch
is {"inputs_BT", "targets_BT": int32, "mask_BT": bool}. If attention stays within documents, it also
has "segments_BT": int32, the number of each input's document in its window.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from moe_erc.checks import BadInput
from moe_erc.data import cache, origin, planted, sources, streams
from moe_erc.data.config import DataConfig
from moe_erc.data.document import Account
from moe_erc.data.mixture import whole_weights
from moe_erc.data.shards import is_pattern
from moe_erc.data.shards.group import label as label_of_shards
from moe_erc.data.shards.source import open_shards
from moe_erc.data.streams import Corpus, Stream
from moe_erc.data.tokenizer import ByteTokenizer, Tokenizer
from moe_erc.data.tokenizer import load as load_tokenizer
from moe_erc.data.windows import (
    MOST_WINDOWS,
    count_windows,
    documents_per_window,
    train_batches,
    validation_batches,
)

__all__ = [
    "Corpus",
    "DataConfig",
    "Stream",
    "describe",
    "documents_per_window",
    "identity_of",
    "prepare",
    "reopen",
    "streams_of",
    "train_batches",
    "validation_batches",
]


def prepare(config: DataConfig) -> Corpus:
    """Open the token streams of a configuration.

    A source is tokenised when it is used with this tokenizer for the first time.

    Raises:
      BadInput, OSError: for anything wrong with the configuration or the text.
    """
    # Weights that cannot be mixed are refused before anything is tokenised.
    whole_weights(config.weights)
    tokenizer = load_tokenizer(config.tokenizer)
    cache_directory = cache.directory_of(config.cache_dir)
    entries = []
    names_by_identity: dict[str, str] = {}
    for name in config.sources:
        # The description is made before the text is read, so that what changes meanwhile shows as a
        # change later.
        seen = origin.describe(name)
        if is_pattern(name):
            entries.append({"name": name, "label": label_of_shards(name), "origin": seen})
            continue
        source = sources.open_source(name, config)
        first = names_by_identity.get(source.identity)
        if first:
            raise BadInput(
                f"data.sources: '{name}' is the same text as '{first}'; "
                "list it once, with data.weights"
            )
        names_by_identity[source.identity] = name
        directory = _tokenised(source, tokenizer, cache_directory)
        place = directory.relative_to(cache_directory).as_posix()
        entries.append({"name": name, "label": source.label, "directory": place, "origin": seen})
    return _corpus(config, tokenizer, entries)


def reopen(record: Mapping, config: DataConfig) -> Corpus | None:
    """The corpus of an earlier run from the cache, or None if it is gone.

    Text is not read again, and shards must still be the same. `record` is the `Corpus.record` of
    that run. Weights and window length are those of `config`.
    """
    entries = record.get("sources", ())
    if not entries:
        return None
    cache_directory = cache.directory_of(config.cache_dir)
    for entry in entries:
        # Shards are not in the cache: they are read where they lie.
        is_text = not is_pattern(entry["name"])
        if is_text and not _is_in_cache(cache_directory / entry["directory"], cache_directory):
            return None
    corpus = _corpus(config, load_tokenizer(config.tokenizer), entries)
    return corpus if streams_of(corpus.record) == streams_of(record) else None


def streams_of(record: Mapping) -> list:
    """The digests of all token streams of a record, which identify its text."""
    return [entry["streams"] for entry in record["sources"]]


def identity_of(record: Mapping, weights: Sequence[int], sequence_length: int) -> str:
    """The `Corpus.identity` of a record's text under other weights and another window length."""
    return cache.digest([record["tokenizer"], list(weights), sequence_length, *streams_of(record)])


def _is_in_cache(directory: Path, cache_directory: Path) -> bool:
    """Whether the directory exists below the cache; a damaged checkpoint may name any other."""
    return directory.resolve().is_relative_to(cache_directory.resolve()) and directory.is_dir()


def _corpus(config: DataConfig, tokenizer: Tokenizer, entries: Sequence[Mapping]) -> Corpus:
    """The streams of `entries`.

    An entry is {"name", "label", "directory", "origin"} of a source; shards have no directory.
    """
    whole = whole_weights(config.weights)
    weights = dict(zip(config.sources, whole, strict=True)) if config.weights else {}
    by_split: dict[str, dict[str, Stream]] = {"train": {}, "validation": {}}
    accounts: dict[str, Account] = {}
    floors: dict[str, float] = {}
    described = []
    for entry in entries:
        found, accounts[entry["name"]] = _opened(config, tokenizer, entry)
        taken = set()
        for domains in by_split.values():
            taken.update(domains)
        names = _domain_names([domain for _, domain, _ in found], entry["label"], taken)
        for split, domain, stream in found:
            by_split[split][names[domain]] = stream
        # Of a token that is one letter, the entropy of the source is known.
        if entry["name"] == planted.NAME and isinstance(tokenizer, ByteTokenizer):
            of_source = config.planted.floor()
            floors |= {names[domain]: of_source[domain] for domain in names}
        digests = [[split, stream.sha256] for split, _, stream in found]
        described.append(dict(entry) | {"streams": digests})
    _check_length(config, by_split["train"].values())
    record = {"tokenizer": tokenizer.identity, "sources": described}
    identity = identity_of(record, list(weights.values()), config.sequence_length)
    return Corpus(
        tokenizer,
        by_split,
        weights,
        identity,
        accounts,
        config.attend_across_documents,
        floors,
        record | {"corpus": identity},
    )


def _opened(
    config: DataConfig, tokenizer: Tokenizer, entry: Mapping
) -> tuple[list[tuple[str, str, Stream]], Account]:
    """(split, domain, stream) of all streams of an entry, and the account of its source."""
    name = entry["name"]
    if is_pattern(name):
        return open_shards(name, config, tokenizer)
    directory = cache.directory_of(config.cache_dir) / entry["directory"]
    return list(streams.read(directory, name)), streams.read_account(directory)


def describe(corpus: Corpus, sequence_length: int, windows: int) -> Iterator[str]:
    """The lines that describe each source, for a run of `windows` training windows.

    The first line has the documents and tokens of each split, and the epochs: how often the run
    reads each training window of `sequence_length` tokens. The second line says which part of the
    source became which split, and what is not read at all.
    """
    windows_of = {}
    for source in corpus.accounts:
        train = _of_source(corpus, "train", source)
        windows_of[source] = sum(count_windows(stream, sequence_length) for stream in train)
    shares = corpus.weights or windows_of
    for source, account in corpus.accounts.items():
        counts = []
        for split in ("train", "validation"):
            members = _of_source(corpus, split, source)
            documents = sum(stream.documents for stream in members)
            tokens = sum(len(stream.tokens_N) for stream in members)
            counts.append(f"{split} {documents:,} documents of {tokens:,} tokens")
        drawn = windows * shares[source] / max(sum(shares.values()), 1)
        # A source that is shorter than one window has none.
        epochs = drawn / max(windows_of[source], 1)
        yield f"data {source!r}: {', '.join(counts)}; {epochs:.3g} epochs of train in this run"
        ignored = ", ".join(f"{count:,} {what}" for what, count in account.ignored.items())
        ending = f"; ignored: {ignored}" if ignored else ""
        yield f"  {account.splits}{ending}"


def _of_source(corpus: Corpus, split: str, source: str) -> list[Stream]:
    return [stream for stream in corpus.streams[split].values() if stream.source == source]


def _tokenised(source: sources.Source, tokenizer: Tokenizer, cache_directory: Path) -> Path:
    """The directory of a source's token streams.

    It is filled now if this source was never tokenised with this tokenizer.
    """
    key = cache.digest([source.identity, tokenizer.identity, streams.FORMAT_VERSION])
    directory = cache_directory / "tokens" / f"{source.label}-{key}"
    if not directory.is_dir():
        with cache.filling(directory) as temporary:
            streams.write(temporary, source, tokenizer)
    return directory


def _domain_names(domains: Iterable[str], label: str, taken: set[str]) -> dict[str, str]:
    """A unique name for every domain of a source: {domain: name}.

    It is the domain's own name, or the label of the source, with a number if that name is taken.
    """
    names = {}
    for domain in dict.fromkeys(domains):
        name = domain or label
        number = 2
        while name in taken or name in names.values():
            name = f"{domain or label}_{number}"
            number = number + 1
        names[domain] = name
    return names


def _check_length(config: DataConfig, train: Iterable[Stream]) -> None:
    """Refuse text from which no training window can be cut, or more than can be shuffled.

    With weights, every source must give one; without, all together must.
    """
    train = list(train)
    groups = [[source] for source in config.sources] if config.weights else [config.sources]
    for group in groups:
        members = [stream for stream in train if stream.source in group]
        windows = sum(count_windows(stream, config.sequence_length) for stream in members)
        if windows > MOST_WINDOWS:
            raise BadInput(
                f"data.sequence_length: {config.sequence_length} cuts {', '.join(group)} into "
                f"{windows:,} windows, and {MOST_WINDOWS:,} can be shuffled together; "
                "give longer windows, or several sources with data.weights"
            )
        if not windows:
            tokens = sum(len(stream.tokens_N) for stream in members)
            needed = config.sequence_length + 1
            raise BadInput(
                f"data.sources: {', '.join(group)} has {tokens} training tokens, fewer than one "
                f"window of {needed} "
                f"(data.sequence_length {config.sequence_length} + 1) in any domain; "
                "give more text or shorter windows"
            )
