"""Documents from a directory of text files, read in the order of their paths.

A .txt file is one document, passed on byte for byte. (A tokenizer that needs Unicode replaces what
is not UTF-8.) A line of a .jsonl or .json file is an object with the text under `text_key`. Files
may be compressed (.gz). The path of a file may name its split (`split_names.py`). If no path names
a held-out split, the hash of each text decides.
"""

import collections
import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from moe_erc.checks import BadInput
from moe_erc.data import file_tree
from moe_erc.data.document import Account, Document, divided_by_hash, split_by_hash
from moe_erc.data.split_names import TRAIN, SplitNames, held_out_name


@dataclasses.dataclass(frozen=True)
class Readable:
    """Which files can be read: the ends of their names, and how messages call such a file."""

    suffixes: tuple[str, ...]
    compressions: tuple[str, ...]  # may follow a suffix
    noun: str

    def suffix(self, name: str) -> str:
        """The suffix of a name that can be read, without its compression; "" for any other."""
        plain = name.lower()
        if plain in _NO_TEXT:
            return ""
        for compression in self.compressions:
            plain = plain.removesuffix(compression)
        return next((suffix for suffix in self.suffixes if plain.endswith(suffix)), "")


PLAIN = Readable((".txt", ".jsonl", ".json"), (".gz",), ".txt or .jsonl file")
# Files that tools of the field write beside the text. They are no text, though their suffix is one
# of text.
_NO_TEXT = (
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "metadata.json",
    "state.json",
)
# Files with these suffixes are data that cannot be read here. If their names mean a split, the
# directory has that split. A file with another suffix, such as train.py, means nothing.
_DATA_SUFFIXES = (
    ".parquet",
    ".arrow",
    ".csv",
    ".tsv",
    ".zst",
    ".bz2",
    ".xz",
    ".lz4",
    ".zip",
    ".tar",
    ".bin",
)
_LISTED = 3  # entries or suffixes that a line names; it counts the others


@dataclasses.dataclass(frozen=True)
class Survey:
    """The contents of a directory: the files to read with their splits, and an account.

    A split None means that the hash of each text decides.
    """

    files: tuple[tuple[file_tree.Entry, str | None], ...]  # in the order of their paths
    account: Account
    has_own_splits: bool


@dataclasses.dataclass
class _Named:
    """One split: the files that can be read, and the entries whose names mean that split."""

    files: list[file_tree.Entry] = dataclasses.field(default_factory=list)
    # in the order of their paths
    entries: dict[str, None] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{_some(self.entries)} ({_counted(len(self.files), 'file')})"

    @property
    def is_empty(self) -> bool:
        """Whether there is no file, or none that has a byte."""
        return not any(file.bytes for file in self.files)


def find(path: Path) -> list[Path]:
    """The text files under a directory that are read, sorted."""
    return [path.joinpath(*file.parts) for file, _ in survey(path, 0.0).files]


def fingerprint(path: Path) -> list[tuple]:
    """Name, size, times of change and inode of every file.

    It changes if a file is added, removed or written. A copy may set the time of the last write,
    but nothing can set the time of the last change of the inode (ctime). Another text of the same
    size and date is therefore noticed.
    """
    return [(file.relative_to(path).as_posix(), *file_tree.stamp(file)) for file in find(path)]


def documents(path: Path, text_key: str, validation_fraction: float) -> Iterator[Document]:
    """Every text of a directory once, with its split."""
    for entry, split in survey(path, validation_fraction).files:
        file = path.joinpath(*entry.parts)
        with _open(file) as content:
            for text in texts(content, str(file), PLAIN.suffix(file.name), text_key):
                yield Document(split or split_by_hash(text, validation_fraction), "", text)


def survey(path: Path, validation_fraction: float) -> Survey:
    """Look at every name under a directory; no text is read.

    Raises:
      BadInput: as `divide`, and for a link that leads back to a directory above it.
    """
    return divide(str(path), file_tree.entries(path), validation_fraction, PLAIN)


def divide(
    place: str,
    found: Iterable[file_tree.Entry],
    validation_fraction: float,
    readable: Readable,
) -> Survey:
    """Decide by their names which of the entries under a directory are read, for which split.

    `place` names the directory in messages.

    Raises:
      BadInput: for a directory without text, and for a split that is empty while the other is not.
    """
    entries = sorted(found, key=lambda entry: entry.parts)
    ignored = collections.Counter(entry.ignored for entry in entries if entry.ignored)
    entries = [entry for entry in entries if entry.ignored != file_tree.HIDDEN]
    files = [entry for entry in entries if _is_text(entry, readable)]
    ignored.update(_of_other_suffixes(entries, readable))
    if not files:
        said = _said(ignored)
        raise BadInput(
            f"data.sources: no {readable.noun} in '{place}'{said}; "
            "add some, or give another directory"
        )
    by_split = _by_split(entries, files, ignored)
    taken, split_rule = _choose(place, by_split, ignored, validation_fraction, readable)
    has_own_splits = len(taken) > 1
    chosen = []
    for split, named in taken.items():
        for file in named.files:
            chosen.append((file, split if has_own_splits else None))
    chosen.sort(key=lambda file_and_split: file_and_split[0].parts)
    return Survey(tuple(chosen), Account(split_rule, dict(ignored)), has_own_splits)


def _by_split(entries: list, files: list, ignored: collections.Counter) -> dict[str | None, _Named]:
    """Files and entries by the split that their paths name, None for those that name none.

    A file is in one split only, even if links lead to it by several paths.
    """
    components = []
    for entry in entries:
        components += entry.parts
    names = SplitNames(components)
    decided = {entry.parts: names.decide(entry.parts) for entry in entries}
    by_split: dict[str | None, _Named] = collections.defaultdict(_Named)
    texts_read = set(files)
    for entry in entries:
        split, depth = decided[entry.parts]
        is_data = entry in texts_read or entry.parts[-1].lower().endswith(_DATA_SUFFIXES)
        is_split = entry.kind != "file" or depth < len(entry.parts) or is_data
        if split and is_split:
            ending = "/" if depth < len(entry.parts) or entry.kind == "directory" else ""
            by_split[split].entries.setdefault("/".join(entry.parts[:depth]) + ending)
    # Held-out paths come first, so that a file that is held out under one name is not trained on
    # under another.
    order = {None: 2, TRAIN: 1}
    seen = set()
    for file in sorted(files, key=lambda file: order.get(decided[file.parts][0], 0)):
        if file.identity in seen:
            ignored["reached by another path as well"] += 1
            continue
        seen.add(file.identity)
        by_split[decided[file.parts][0]].files.append(file)
    return by_split


def _choose(
    place: str,
    by_split: dict[str | None, _Named],
    ignored: collections.Counter,
    validation_fraction: float,
    readable: Readable,
) -> tuple[dict[str | None, _Named], str]:
    """(splits to read, by our names, the sentence that says which they are).

    The one split None means that the hash of each text decides.
    """
    train = by_split.get(TRAIN, _Named())
    unnamed = by_split.get(None, _Named())
    held_out = held_out_name(by_split)
    if held_out is None:
        if train.entries and train.is_empty:
            others = f"{len(unnamed.files)} others"
            raise BadInput(_one_is_empty(place, "training", train, others, ignored, readable))
        everything = _Named(train.files + unnamed.files)
        what = f"{_counted(len(everything.files), 'file')}, none of them named as held out"
        return {None: everything}, divided_by_hash(what, validation_fraction)
    validation = by_split[held_out]
    for name, split, other in (("training", train, validation), ("held-out", validation, train)):
        if split.is_empty:
            raise BadInput(_one_is_empty(place, name, split, str(other), ignored, readable))
    for word, named in by_split.items():
        if word not in (None, TRAIN, held_out) and named.files:
            what = f"files in another held-out split, {_some(named.entries)}"
            ignored[what] += len(named.files)
    if unnamed.files:
        ignored["text files whose names say no split"] += len(unnamed.files)
    split_rule = f"train is {train}, validation is {validation}"
    return {TRAIN: train, "validation": validation}, split_rule


def _one_is_empty(
    place: str,
    name: str,
    empty: _Named,
    other: str,
    ignored: collections.Counter,
    readable: Readable,
) -> str:
    said = f"no text in {_some(empty.entries)}" if empty.entries else "nothing is named so"
    return (
        f"data.sources: '{place}' has no {name} split ({said}), though it has "
        f"{other}{_said(ignored)}; "
        f"give both splits a {readable.noun}, named such as train/ and validation/, "
        "or name neither so"
    )


def _is_text(entry: file_tree.Entry, readable: Readable) -> bool:
    return entry.kind == "file" and bool(readable.suffix(entry.parts[-1]))


def _of_other_suffixes(entries: list, readable: Readable) -> dict[str, int]:
    """How many files of which suffixes are not read, the frequent ones by name."""
    files = [entry for entry in entries if entry.kind == "file"]
    others = [entry.parts[-1] for entry in files if not _is_text(entry, readable)]
    suffixes = collections.Counter(_suffix(name) for name in others).most_common()
    counts = {}
    for suffix, count in suffixes[:_LISTED]:
        counts[f"{suffix!r} files" if suffix else "files without suffix"] = count
    rest = sum(count for _, count in suffixes[_LISTED:])
    if rest:
        counts["files of other suffixes"] = rest
    return counts


def _suffix(name: str) -> str:
    """The suffix of a name; that of a compression has the one in front of it too: .jsonl.zst."""
    suffixes = Path(name).suffixes
    is_compressed = bool(suffixes) and suffixes[-1] in (".gz", ".zst", ".bz2", ".xz")
    return "".join(suffixes[-2:] if is_compressed else suffixes[-1:])


def _said(ignored: collections.Counter) -> str:
    counts = ", ".join(f"{count} {what}" for what, count in ignored.items())
    return f" (ignored: {counts})" if counts else ""


def _some(names: Iterable[str]) -> str:
    """The first names, quoted, and how many more there are."""
    quoted = [repr(name) for name in names]
    rest = len(quoted) - _LISTED
    more = f" and {rest} more" if rest > 0 else ""
    return " ".join(quoted[:_LISTED]) + more


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def texts(content: Iterable[bytes], name: str, suffix: str, text_key: str) -> Iterator[bytes]:
    """Every text of an open file, which is unpacked as it is read; BadInput for what is no text."""
    try:
        if suffix == ".txt":
            yield b"".join(content)
            return
        for number, line in enumerate(content, start=1):
            if line.strip():
                yield _text_of_line(line, text_key, f"{name}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadInput(
            f"data.sources: '{name}' cannot be unpacked ({error}); fetch it again"
        ) from None


def _open(file: Path) -> BinaryIO:
    return gzip.open(file, "rb") if file.suffix.lower() == ".gz" else open(file, "rb")


def _text_of_line(line: bytes, text_key: str, place: str) -> bytes:
    try:
        text = json.loads(line)[text_key]
        if not isinstance(text, str):
            raise TypeError
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        message = (
            f"data.sources: {place} is not a JSON object with a string under '{text_key}'; "
            "mend it or data.text_key (a file holds one object a line)"
        )
        raise BadInput(message) from None
    return text.encode(errors="replace")  # JSON can spell half a surrogate pair, UTF-8 cannot
