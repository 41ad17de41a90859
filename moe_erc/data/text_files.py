"""Documents from a directory of .txt and .jsonl files, read in the order of their paths.

A .txt file is one document, passed on byte for byte (a tokenizer that needs Unicode replaces what is not UTF-8). A line
of a .jsonl file is an object with the text under `text_key`. Entries called `train` and `validation` (or `test`) at the
top, as files or directories, are taken as the splits they are named after; otherwise the hash of each text decides.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from moe_erc.checks import BadInput
from moe_erc.data.document import Document, held_out_name, split_by_hash

_SUFFIXES = (".txt", ".jsonl")


def find(path: Path) -> list[Path]:
    """The text files under a directory, sorted."""
    files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
    if not files:
        raise BadInput(f"data.sources: no .txt or .jsonl file in '{path}'; add some, or give another directory")
    return files


def fingerprint(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of every file: it differs as soon as a file is added, removed or written."""
    found = ((file, file.stat()) for file in find(path))
    return [(file.relative_to(path).as_posix(), stat.st_size, stat.st_mtime_ns) for file, stat in found]


def documents(path: Path, text_key: str, validation_fraction: float) -> Iterator[Document]:
    """Every text of a directory once, with its split."""
    files = find(path)
    top_names = {file: Path(file.relative_to(path).parts[0]).stem for file in files}
    held_out = held_out_name(set(top_names.values()))
    has_own_splits = held_out is not None and "train" in top_names.values()
    own_splits = {"train": "train", held_out: "validation"} if has_own_splits else {}
    for file in files:
        if own_splits and top_names[file] not in own_splits:
            continue  # a second held-out set, kept out of training
        for text in _texts(file, text_key):
            yield Document(own_splits.get(top_names[file]) or split_by_hash(text, validation_fraction), "", text)


def _texts(file: Path, text_key: str) -> Iterator[bytes]:
    if file.suffix == ".txt":
        yield file.read_bytes()
        return
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _text_of_line(line, text_key, f"{file}:{number}")


def _text_of_line(line: bytes, text_key: str, place: str) -> bytes:
    try:
        text = json.loads(line)[text_key]
        if not isinstance(text, str):
            raise TypeError
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        message = (
            f"data.sources: {place} is not a JSON object with a string under '{text_key}'; mend it or data.text_key"
        )
        raise BadInput(message) from None
    return text.encode(errors="replace")  # JSON can spell half a surrogate pair, UTF-8 cannot
