"""What the name of text means: the embedded or the planted corpus, a directory, or a TFDS data set.

An existing directory wins over a data set of the same name; what looks like a path is never looked
up as a name. Sources that are token shards are in `shards/source.py`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_erc.checks import BadInput
from moe_erc.data import cache, embedded, paths, planted, text_files, tfds_source
from moe_erc.data.config import DataConfig
from moe_erc.data.document import Account, Document
from moe_erc.data.python_source import installed_trees, versions
from moe_erc.data.shards import is_pattern

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
    bytes: int = 0  # that its files or records hold, compressed or not; 0 where text is made


def open_source(name: str, config: DataConfig) -> Source:
    """Find (and for TFDS prepare) what `name` stands for; no text is read before `documents()`."""
    if is_pattern(name):
        raise BadInput(
            f"data.sources: {name!r} is tokens already, and text is needed here; "
            "name the text that they were made of"
        )
    if name == embedded.NAME:
        return _embedded()
    if name == planted.NAME:
        return _planted(config.planted)
    path = paths.local(name)
    if (path / "dataset_info.json").is_file():
        return _from_tfds(name, tfds_source.in_directory(path), config)
    if path.is_dir():
        return _from_directory(name, path, config)
    if name[0] in "/.~" or path.exists():
        raise BadInput(
            f"data.sources: no such directory '{name}'; "
            "give an existing directory, a TFDS name such as 'c4/en', 'embedded' or 'planted'"
        )
    return _from_tfds(name, tfds_source.named(name, config.text_key), config)


def _embedded() -> Source:
    trees = installed_trees()
    return Source(
        name=embedded.NAME,
        label=embedded.NAME,
        identity=cache.digest([_RULES, embedded.NAME, versions(trees)]),
        documents=functools.partial(embedded.documents, trees),
        account=embedded.account(),
        # It divides itself by the hash of each text: a small one may have nothing held out.
        has_own_splits=False,
    )


def _planted(options: planted.Planted) -> Source:
    held_out = options.regimes * options.validation
    splits = f"drawn from {options.regimes} regimes: {held_out} documents are held out"
    return Source(
        name=planted.NAME,
        label=planted.NAME,
        identity=cache.digest([_RULES, planted.NAME, dataclasses.asdict(options)]),
        documents=options.texts,
        account=Account(splits, {}),
        has_own_splits=True,
        count=options.count,
    )


def _from_directory(name: str, path: Path, config: DataConfig) -> Source:
    survey = text_files.survey(path, config.validation_fraction)
    settings = [config.text_key, config.validation_fraction]
    key = [_RULES, "text files", str(path.resolve()), text_files.fingerprint(path), settings]
    return Source(
        name=name,
        label=label_of(path.resolve().name),
        identity=cache.digest(key),
        documents=functools.partial(text_files.documents, path, *settings),
        account=survey.account,
        has_own_splits=survey.has_own_splits,
        bytes=sum(file.bytes for file, _ in survey.files),
    )


def _from_tfds(name: str, builder: tfds_source.Builder, config: DataConfig) -> Source:
    tfds_source.check_text(builder, config.text_key)
    splits = tfds_source.splits(builder)
    tfds_source.check_splits(builder, splits)
    settings = [config.text_key, config.validation_fraction]
    key = [_RULES, "tfds", tfds_source.fingerprint(builder), str(builder.data_dir), settings]
    return Source(
        name=name,
        label=label_of(builder.info.full_name.rsplit("/", 1)[0]),
        identity=cache.digest(key),
        documents=functools.partial(tfds_source.documents, builder, *settings),
        account=tfds_source.account(builder, splits, config.validation_fraction),
        has_own_splits=len(set(splits.values())) > 1,
        count=tfds_source.count(builder),
        bytes=tfds_source.size(builder),
    )


def label_of(name: str) -> str:
    """A name of letters, digits and `_`, which file systems take."""
    return re.sub(r"\W+", "_", name).strip("_").lower()[:_LONGEST_LABEL] or "text"
