"""Documents from TensorFlow Datasets (TFDS), without TensorFlow.

Files in the array_record format are read by `as_data_source`.
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

    It is prepared now if it was not before. A data set without the feature `text_key` is refused
    before anything is downloaded.
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
    """Prepare a data set once; if another process finished the same one first, use that."""
    builder = construct()
    tfds.display_progress_bar(sys.stderr.isatty())
    try:
        # TFDS prints to standard output, which is for results.
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
        # A mocked data set has no counts.
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

    The documents of the other splits, which are not read, are counted.
    """
    ignored = {}
    for name, info in builder.info.splits.items():
        if name not in splits:
            ignored[f"documents of the split {name!r}"] = info.num_examples
    train = _quoted(splits, TRAIN)
    validation = _quoted(splits, "validation")
    if not validation:
        what = f"split {train}, and none held out"
        return Account(divided_by_hash(what, validation_fraction), ignored)
    return Account(f"train is the split {train}, validation is the split {validation}", ignored)


def _quoted(splits: Mapping[str, str], ours: str) -> str:
    """The data set's own names of one of our splits."""
    return " ".join(repr(name) for name, split in splits.items() if split == ours)


def fingerprint(builder: Builder) -> list:
    """The identity of a data set: its name, version, features, sizes of splits, and files."""
    bytes_by_split = {name: split.num_bytes for name, split in builder.info.splits.items()}
    sizes = []
    for name, split in splits(builder).items():
        sizes.append((name, split, len(_open(builder, name)), bytes_by_split.get(name)))
    # Files on a disk have stamps. Files in a bucket have none, and a mocked data set has no files:
    # there only the sizes count.
    directory = Path(os.fspath(builder.data_path))
    files = []
    if directory.is_dir():
        files = sorted((file.name, *file_tree.stamp(file)) for file in directory.iterdir())
    return [builder.info.full_name, sorted(builder.info.features), sizes, files]


def count(builder: Builder) -> int:
    """The number of documents that `documents` yields."""
    return sum(len(_open(builder, name)) for name in splits(builder))


def size(builder: Builder) -> int:
    """The bytes of the records that `documents` reads, as far as the data set says them."""
    infos = [builder.info.splits.get(name) for name in splits(builder)]
    return sum(info.num_bytes or 0 for info in infos if info)


def documents(builder: Builder, text_key: str, validation_fraction: float) -> Iterator[Document]:
    """Every text of the data set's train split and of its held-out split.

    Without a held-out split, train is divided by hash.
    """
    found = splits(builder)
    has_own_splits = len(set(found.values())) > 1
    for name, split in found.items():
        for text in texts(builder, name, text_key):
            own_split = split if has_own_splits else split_by_hash(text, validation_fraction)
            yield Document(own_split, "", text)


def texts(
    builder: Builder, split: str, text_key: str, part: int = 0, parts: int = 1
) -> Iterator[bytes]:
    """The texts of the records of one of `parts` equal ranges of a split."""
    records = _open(builder, split)
    start = len(records) * part // parts
    stop = len(records) * (part + 1) // parts
    for number in range(start, stop):
        try:
            record = records[number]
        # The reader of array_record raises this for a file that is missing or damaged.
        except RuntimeError as error:
            raise BadInput(
                f"data.sources: '{builder.data_dir}' cannot be read ({_one_line(error)}); "
                "prepare it again"
            ) from None
        yield _as_bytes(record[text_key])


def splits(builder: Builder) -> dict[str, str]:
    """{the data set's own name of a split to read: "train" or "validation"}.

    A split that has exactly the name wins over those whose names only begin with it (train_clean).
    """
    # A mocked data set has no metadata; it has every split.
    names = list(builder.info.splits) or [TRAIN]
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
    """The splits of that word: the one of exactly that name, or else all whose names begin so."""
    if word is None:
        return []
    if word in words:
        return [word]
    return [name for name, found in words.items() if found == word]


def _open(builder: Builder, split: str):
    info = builder.info.splits.get(split)
    if info and not info.num_examples:
        return []  # the reader needs at least one file
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError:
        raise BadInput(
            f"data.sources: '{builder.data_dir}' is in the {builder.info.file_format.value} "
            "format; prepare it as array_record"
        ) from None


def _register_legacy_builders() -> None:
    """Import every package of builders.

    TFDS itself stops at the first package that needs something that is not installed.
    """
    for module in pkgutil.iter_modules(tfds.__path__, "tensorflow_datasets."):
        if module.ispkg:
            try:
                importlib.import_module(module.name)
            except ImportError:
                continue


def _is_string(feature) -> bool:
    is_scalar = getattr(feature, "shape", None) == ()
    return is_scalar and tfds.core.utils.dtype_utils.is_string(feature.np_dtype)


def _as_bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode(errors="replace")


def _one_line(error: Exception) -> str:
    """The beginning of an error message of TFDS, which may have pages."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= _LONGEST_REASON else words[:_LONGEST_REASON] + "…"
