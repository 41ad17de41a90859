"""Documents as flat arrays of token ids on disk, one per domain and split, each followed by the end-of-document token.

Little-endian uint16, or uint32 where the vocabulary needs it. `index.json` is the table of contents. Reading is a
memory map: a step touches the pages of its own windows and nothing else.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moe_erc import bars
from moe_erc.checks import BadInput
from moe_erc.data.document import Document
from moe_erc.data.sources import Source
from moe_erc.data.tokenizer import Tokenizer

FORMAT_VERSION = 1
_INDEX = "index.json"
_DTYPES = ("<u2", "<u4")
_KINDS = {"split": str, "domain": str, "file": str, "tokens": int, "bytes": int, "documents": int, "sha256": str}
_BYTES_PER_BATCH = 2**20  # of text held in memory while it is tokenised


@dataclasses.dataclass(frozen=True)
class Stream:
    """All tokens of one domain and split of one source."""

    source: str  # as configured
    tokens_N: np.ndarray  # read-only memory map
    bytes: int  # of UTF-8 text, for bits per byte
    documents: int
    sha256: str  # of the tokens


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token streams by split and domain, and how sources are mixed for training."""

    tokenizer: Tokenizer
    streams: Mapping[str, Mapping[str, Stream]]  # "train" or "validation" -> domain -> stream
    weights: Mapping[str, int]  # source -> its share of the training windows; empty means proportional to size
    identity: str  # differs when any batch could hold other tokens


class _Writer:
    """One stream being written to an open file, and what the index will say of it."""

    def __init__(self, file: BinaryIO, dtype: np.dtype):
        self._file, self._dtype, self._digest = file, dtype, hashlib.sha256()
        self._tokens = self._bytes = self._documents = 0

    def append(self, ids: np.ndarray, eos_id: int, text_bytes: int) -> None:
        data = np.append(ids.astype(self._dtype), self._dtype.type(eos_id)).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._tokens += len(ids) + 1
        self._bytes += text_bytes
        self._documents += 1

    def summary(self) -> dict[str, int | str]:
        counts = {"tokens": self._tokens, "bytes": self._bytes, "documents": self._documents}
        return counts | {"sha256": self._digest.hexdigest()}


def write(directory: Path, source: Source, tokenizer: Tokenizer) -> None:
    """Tokenise every document of a source once, in bounded memory, and write the index last."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    writers: dict[tuple[str, str], _Writer] = {}
    bar = bars.bar(f"Tokenising {source.label}", source.count, "documents")
    with bar, contextlib.ExitStack() as files:
        for batch in _batches(source.documents()):
            for document, ids in zip(batch, tokenizer.encode_batch([document.text for document in batch]), strict=True):
                key = document.split, document.domain
                if key not in writers:
                    writers[key] = _Writer(files.enter_context(open(directory / _file_name(*key), "wb")), dtype)
                writers[key].append(ids, tokenizer.eos_id, len(document.text))
            bar.update(len(batch))
    entries = [
        {"split": split, "domain": domain, "file": _file_name(split, domain)} | writer.summary()
        for (split, domain), writer in sorted(writers.items())
    ]
    index = json.dumps({"dtype": dtype.str, "streams": entries}, indent=1)
    (directory / _INDEX).write_text(index, encoding="utf-8")


def read(directory: Path, source: str) -> Iterator[tuple[str, str, Stream]]:
    """Split, domain and memory-mapped stream of everything that `write` left in a directory."""
    dtype, entries = _read_index(directory)
    for entry in entries:
        file = directory / entry["file"]
        size, written = file.stat().st_size, entry["tokens"] * dtype.itemsize
        if size != written:
            raise BadInput(
                f"data.cache_dir: '{file}' has {size} bytes and was written with {written}; delete '{directory}'"
            )
        tokens_N = np.memmap(file, dtype, mode="r")
        yield (
            entry["split"],
            entry["domain"],
            Stream(source, tokens_N, entry["bytes"], entry["documents"], entry["sha256"]),
        )


def _read_index(directory: Path) -> tuple[np.dtype, list[dict]]:
    """Type of the tokens and entries of the streams, each in a file of the directory itself."""
    try:
        index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
        dtype, entries = index["dtype"], index["streams"]
        sound = dtype in _DTYPES and all(map(_is_entry, entries))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise BadInput(f"data.cache_dir: '{directory / _INDEX}' is no table of token streams; delete '{directory}'")
    return np.dtype(dtype), entries


def _is_entry(entry: dict) -> bool:
    kinds = {key: type(value) for key, value in entry.items()}
    return kinds == _KINDS and entry["file"] == _file_name(entry["split"], entry["domain"]) and "/" not in entry["file"]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Non-empty documents in lists that a tokenizer can work on in parallel, of about a megabyte each."""
    batch, size = [], 0
    for document in documents:
        if not document.text:
            continue
        batch.append(document)
        size += len(document.text)
        if size >= _BYTES_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _file_name(split: str, domain: str) -> str:
    return f"{split}-{domain or 'text'}.bin"
