"""Documents from TensorFlow Datasets, without TensorFlow.

Files of array_record are read through `as_data_source`.
"""

import contextlib
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import tensorflow_datasets as tfds

from moe_erc.checks import BadInput, nearest
from moe_erc.data import file_tree, tfds_metadata
from moe_erc.data.document import Account, Document, divided_by_hash, split_by_hash
from moe_erc.data.split_names import TRAIN, held_out_name, split_word

Builder = tfds.core.DatasetBuilder
_LONGEST_REASON = 200  # characters


def in_directory(path: Path) -> Builder:
    """A data set that TFDS prepared at `path`."""
    tfds_metadata.check(path)
    try:
        return tfds.builder_from_directory(os.fspath(path))
    except Exception as error:
        reason = _one_line(error)
        raise BadInput(
            f"data.sources: '{path}' holds a dataset_info.json that TFDS cannot read ({reason}); "
            "prepare it again"
        ) from error


def named(name: str, text_key: str) -> Builder:
    """A data set by its TFDS name, with an optional configuration ("c4/en").

    It is prepared now if it is not yet.

    One without the feature `text_key` is refused before anything is downloaded.
    """
    _register_legacy_builders()

    def construct() -> Builder:
        return tfds.builder(name, file_format="array_record")

    try:
        builder = construct()
    except tfds.core.DatasetNotFoundError:
        known = ["embedded", *tfds.list_builders(with_community_datasets=False)]
        raise BadInput(
            f"data.sources: no source is called '{name}'; "
            f"the nearest is '{nearest(name, known)}', and a directory starts with '/', '.' or '~'"
        ) from None
    except Exception as error:
        raise BadInput(
            f"data.sources: TFDS refuses '{name}' ({_one_line(error)}); "
            "see the names at tensorflow.org/datasets"
        ) from error
    check_text(builder, text_key)
    try:
        return prepare(construct)
    except Exception as error:
        raise BadInput(
            f"data.sources: '{name}' is not prepared in '{construct().data_dir}' "
            f"and TFDS cannot prepare it here ({_one_line(error)}); "
            "prepare it elsewhere as array_record and give its directory"
        ) from error


def prepare(construct: Callable[[], Builder]) -> Builder:
    """Prepare a data set once; when another process finished the same one first, use that."""
    builder = construct()
    tfds.display_progress_bar(sys.stderr.isatty())
    try:
        # TFDS announces on stdout, which belongs to results
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(file_format="array_record")
    except OSError:
        builder = construct()
        if not builder.data_path.exists():
            raise
    return builder


def check_text(builder: Builder, text_key: str) -> None:
    """Refuse a data set whose feature `text_key` is absent or not one string."""
    texts = sorted(key for key, feature in builder.info.features.items() if _is_string(feature))
    if text_key not in texts:
        raise BadInput(
            f"data.text_key: '{builder.info.full_name}' has no text feature '{text_key}'; "
            f"set it to one of {texts}"
        )


def check_splits(builder: Builder, splits: Mapping[str, str]) -> None:
    """Refuse a data set of which one split is empty while the other is not."""
    counts = {name: info.num_examples for name, info in builder.info.splits.items()}
    for ours in sorted(set(splits.values())):
        # a mocked data set has no counts
        names = [name for name in splits if splits[name] == ours and name in counts]
        if names and not sum(counts[name] for name in names):
            raise BadInput(
                f"data.sources: '{builder.info.full_name}' has no documents in its split "
                f"{', '.join(map(repr, names))} "
                f"(documents by split: {counts}); "
                "prepare it again, or give a data set that has some"
            )


def account(builder: Builder, splits: Mapping[str, str], validation_fraction: float) -> Account:
    """Which of the data set's splits became which of ours.

    It counts the documents of the others, which are not read.
    """
    ignored = {
        f"documents of the split {name!r}": info.num_examples
        for name, info in builder.info.splits.items()
        if name not in splits
    }
    names = {
        ours: " ".join(repr(name) for name in splits if splits[name] == ours)
        for ours in splits.values()
    }
    if len(names) == 1:
        return Account(
            divided_by_hash(f"split {names[TRAIN]}, and none held out", validation_fraction),
            ignored,
        )
    return Account(
        f"train is the split {names[TRAIN]}, validation is the split {names['validation']}", ignored
    )


def fingerprint(builder: Builder) -> list:
    """What tells a data set from others.

    Name, configuration and version, its features, sizes of its splits, and its files.
    """
    bytes_by_split = {name: split.num_bytes for name, split in builder.info.splits.items()}
    # On a disk. In a bucket, where files have no such stamps, sizes must do; a mocked data set has
    # no files at all.
    directory = Path(os.fspath(builder.data_path))
    return [
        builder.info.full_name,
        sorted(builder.info.features),
        [
            (name, split, len(_open(builder, name)), bytes_by_split.get(name))
            for name, split in splits(builder).items()
        ],
        sorted((file.name, *file_tree.stamp(file)) for file in directory.iterdir())
        if directory.is_dir()
        else [],
    ]


def count(builder: Builder) -> int:
    """The number of documents that `documents` yields."""
    return sum(len(_open(builder, name)) for name in splits(builder))


def documents(builder: Builder, text_key: str, validation_fraction: float) -> Iterator[Document]:
    """Every text of the data set's train split and of the one it holds out.

    Where it holds none out, train is divided by hash.
    """
    found = splits(builder)
    has_own_splits = len(set(found.values())) > 1
    for name, split in found.items():
        for record in _records(builder, name):
            text = _as_bytes(record[text_key])
            own_split = split if has_own_splits else split_by_hash(text, validation_fraction)
            yield Document(own_split, "", text)


def splits(builder: Builder) -> dict[str, str]:
    """The data set's own names of the splits to read -> "train" or "validation".

    A split that is called exactly so wins over those whose names only begin so (train_clean).
    """
    names = list(builder.info.splits) or [TRAIN]  # a mocked data set has no metadata, and any split
    words = {name: split_word(name) for name in names}
    train = _called(TRAIN, words)
    if not train:
        raise BadInput(
            f"data.sources: '{builder.info.full_name}' has the splits {names}, none called "
            "'train'; give one that has"
        )
    held_out = _called(held_out_name(words.values()), words)
    return dict.fromkeys(train, TRAIN) | dict.fromkeys(held_out, "validation")


def _called(word: str | None, words: Mapping[str, str | None]) -> list[str]:
    if word is None:
        return []
    return [word] if word in words else [name for name, found in words.items() if found == word]


def _open(builder: Builder, split: str):
    info = builder.info.splits.get(split)
    if info and not info.num_examples:
        return []  # the reader wants a file at least
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError:
        raise BadInput(
            f"data.sources: '{builder.data_dir}' is in the {builder.info.file_format.value} "
            "format; "
            "prepare it as array_record"
        ) from None


def _records(builder: Builder, split: str) -> Iterator[dict]:
    records = iter(_open(builder, split))
    while True:
        try:
            record = next(records)
        except StopIteration:
            return
        # all that the reader of array_record says of a file that is missing or damaged
        except RuntimeError as error:
            raise BadInput(
                f"data.sources: '{builder.data_dir}' cannot be read ({_one_line(error)}); "
                "prepare it again"
            ) from None
        yield record


def _register_legacy_builders() -> None:
    """Import every package of builders.

    TFDS does so only up to the first that needs something not installed.
    """
    for module in pkgutil.iter_modules(tfds.__path__, "tensorflow_datasets."):
        if module.ispkg:
            try:
                importlib.import_module(module.name)
            except ImportError:
                continue


def _is_string(feature) -> bool:
    return getattr(feature, "shape", None) == () and tfds.core.utils.dtype_utils.is_string(
        feature.np_dtype
    )


def _as_bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode(errors="replace")


def _one_line(error: Exception) -> str:
    """The beginning of what TFDS says, which may run over pages."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= _LONGEST_REASON else words[:_LONGEST_REASON] + "…"
