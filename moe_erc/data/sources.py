"""What a source name means: the embedded corpus, a directory, or a TFDS data set.

An existing directory wins over a data set of the same name; what looks like a path is never looked up as a name.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator

from moe_erc.checks import BadInput
from moe_erc.data import cache, paths, text_files, tfds_source
from moe_erc.data.config import DataConfig
from moe_erc.data.document import Account, Document

_RULES = 2  # counts up when the same files or records may give other documents or splits
_LONGEST_LABEL = 64  # characters; file systems allow 255 for the names made of it


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents that can be read again and again in the same order."""

    name: str  # as configured
    label: str  # short, usable in file and metric names
    identity: str  # changes when the documents may have changed
    documents: Callable[[], Iterator[Document]]
    account: Account
    has_own_splits: bool  # then neither may be without text
    count: int | None = None  # number of documents, where known without reading them


def open_source(name: str, config: DataConfig) -> Source:
    """Find (and for TFDS prepare) what `name` stands for; no text is read before `documents()` is called."""
    if name == "embedded":
        builder = tfds_source.embedded(cache.root(config.cache_dir))
        return _from_tfds(name, builder, config, "text", "domain")
    path = paths.local(name)
    if (path / "dataset_info.json").is_file():
        return _from_tfds(name, tfds_source.in_directory(path), config, config.text_key)
    if path.is_dir():
        settings = [config.text_key, config.validation_fraction]
        survey = text_files.survey(path, config.validation_fraction)
        key = [_RULES, "text files", str(path.resolve()), text_files.fingerprint(path), settings]
        documents = functools.partial(text_files.documents, path, *settings)
        label = _label(path.resolve().name)
        return Source(name, label, cache.digest(key), documents, survey.account, survey.has_own_splits)
    if name[0] in "/.~" or path.exists():
        raise BadInput(
            f"data.sources: no such directory '{name}'; "
            "give an existing directory, a TFDS name such as 'c4/en', or 'embedded'"
        )
    return _from_tfds(name, tfds_source.named(name, config.text_key), config, config.text_key)


def _from_tfds(
    name: str, builder: tfds_source.Builder, config: DataConfig, text_key: str, domain_key: str = ""
) -> Source:
    tfds_source.check_text(builder, text_key)
    settings = [text_key, config.validation_fraction, domain_key]
    splits = tfds_source.splits(builder)
    if not domain_key:
        tfds_source.check_splits(builder, splits)
    key = [_RULES, "tfds", tfds_source.fingerprint(builder), str(builder.data_dir), settings]
    documents = functools.partial(tfds_source.documents, builder, *settings)
    label = _label(builder.info.full_name.rsplit("/", 1)[0])
    account = tfds_source.account(builder, splits, config.validation_fraction)
    # The embedded corpus divides itself by the hash of each text: a small one may have nothing held out.
    has_own_splits = not domain_key and len(set(splits.values())) > 1
    count = tfds_source.count(builder)
    return Source(name, label, cache.digest(key), documents, account, has_own_splits, count)


def _label(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_").lower()[:_LONGEST_LABEL] or "text"
