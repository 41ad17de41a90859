"""From `config.data` to batches: the part of this package that scripts talk to.

    corpus = prepare(DataConfig(**config.data))
    for batch in train_batches(corpus, sequence_length, batch_size, seed, start_step): ...

Text is tokenised once and opened from the cache ever after; a batch is {"inputs_BT", "targets_BT": int32, "mask_BT":
bool}, and "segments_BT": int32, the document in its window of every input, where attention is to stay within documents.
"""

from collections.abc import Iterable
from pathlib import Path

from moe_erc.checks import BadInput
from moe_erc.data import cache, sources, streams
from moe_erc.data.config import DataConfig
from moe_erc.data.mixture import whole_weights
from moe_erc.data.streams import Corpus, Stream
from moe_erc.data.tokenizer import Tokenizer
from moe_erc.data.tokenizer import load as load_tokenizer
from moe_erc.data.windows import count_windows, documents_per_window, train_batches, validation_batches

__all__ = ["Corpus", "DataConfig", "Stream", "documents_per_window", "prepare", "train_batches", "validation_batches"]


def prepare(config: DataConfig) -> Corpus:
    """Open the token streams of a configuration, tokenising each source the first time it is seen with this tokenizer.

    Raises ValueError or OSError, with one line that names the value and the mend, for anything wrong with the
    configuration or the text.
    """
    weights = dict(zip(config.sources, whole_weights(config.weights), strict=True)) if config.weights else {}
    tokenizer = load_tokenizer(config.tokenizer)
    by_split: dict[str, dict[str, Stream]] = {"train": {}, "validation": {}}
    content = [tokenizer.identity, list(weights.values()), config.sequence_length]
    for name in config.sources:
        source = sources.open_source(name, config)
        found = list(streams.read(_tokenised(source, tokenizer, cache.root(config.cache_dir)), name))
        taken = {domain for split in by_split.values() for domain in split}
        names = _domain_names([domain for _, domain, _ in found], source.label, taken)
        for split, domain, stream in found:
            by_split[split][names[domain]] = stream
        content.append([(split, stream.sha256) for split, _, stream in found])
    _check_length(config, by_split["train"].values())
    across = config.attend_across_documents
    return Corpus(tokenizer, by_split, weights, cache.digest(content), attend_across_documents=across)


def _tokenised(source: sources.Source, tokenizer: Tokenizer, cache_root: Path) -> Path:
    """The directory of a source's token streams, filled now if source and tokenizer were never seen together."""
    key = cache.digest([source.identity, tokenizer.identity, streams.FORMAT_VERSION])
    directory = cache_root / "tokens" / f"{source.label}-{key}"
    if not directory.is_dir():
        with cache.filling(directory) as temporary:
            streams.write(temporary, source, tokenizer)
    return directory


def _domain_names(domains: Iterable[str], label: str, taken: set[str]) -> dict[str, str]:
    """A name for every domain of a source that none before it has: its own or its source's, with a number if taken."""
    names = {}
    for domain in dict.fromkeys(domains):
        name, number = domain or label, 2
        while name in taken or name in names.values():
            name, number = f"{domain or label}_{number}", number + 1
        names[domain] = name
    return names


def _check_length(config: DataConfig, train: Iterable[Stream]) -> None:
    """Refuse text from which no training window can be cut; with weights, every source must give one."""
    train = list(train)
    for group in [[source] for source in config.sources] if config.weights else [config.sources]:
        members = [stream for stream in train if stream.source in group]
        if not any(count_windows(stream, config.sequence_length) for stream in members):
            tokens, needed = sum(len(stream.tokens_N) for stream in members), config.sequence_length + 1
            raise BadInput(
                f"data.sources: {', '.join(group)} has {tokens} training tokens, fewer than one window of {needed} "
                f"(data.sequence_length {config.sequence_length} + 1) in any domain; give more text or shorter windows"
            )
