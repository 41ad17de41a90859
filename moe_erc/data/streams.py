"""Documents as flat arrays of token ids on disk, one per domain and split.

Each document is followed by the end-of-document token.

Little-endian uint16, or uint32 where the vocabulary needs it. `index.json` is the table of
contents. Reading is a memory map: a step touches the pages of its own windows and nothing else. The
table also keeps the account of how the source was divided, so that a run that reads the cache says
the same as the one that filled it.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moe_erc.checks import BadInput
from moe_erc.data import bars
from moe_erc.data.document import Account, Document
from moe_erc.data.sources import Source
from moe_erc.data.tokenizer import Tokenizer

FORMAT_VERSION = 2
_INDEX = "index.json"
_DTYPES = ("<u2", "<u4")
_KINDS = {
    "split": str,
    "domain": str,
    "file": str,
    "tokens": int,
    "bytes": int,
    "documents": int,
    "sha256": str,
}
_BYTES_PER_BATCH = 2**20  # of text held in memory while it is tokenised
_WITHOUT_TEXT = "documents without text"
# of a domain that names its file: alike on every file system
_PLAIN_NAME = re.compile(r"[a-z0-9_]{1,64}")


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
    # source -> its share of the training windows; empty means proportional to size
    weights: Mapping[str, int]
    identity: str  # differs when any batch could hold other tokens
    accounts: Mapping[str, Account] = dataclasses.field(default_factory=dict)  # by source
    # False: windows say which of their tokens are one document
    attend_across_documents: bool = True
    # domain -> nats per token that no model can go below, where that is known
    floors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    # where it lies in the cache: `text.reopen`
    record: Mapping = dataclasses.field(default_factory=dict)


class _Writer:
    """One stream being written to an open file, and what the index will say of it."""

    def __init__(self, file: BinaryIO, dtype: np.dtype):
        self._file = file
        self._dtype = dtype
        self._digest = hashlib.sha256()
        self._tokens = 0
        self._bytes = 0
        self._documents = 0

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
    """Tokenise every document of a source once, in bounded memory, and write the index last.

    BadInput if the source has splits of its own and one of them has no document with text.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    writers: dict[tuple[str, str], _Writer] = {}
    without_text: collections.Counter[str] = collections.Counter()
    bar = bars.bar(f"Tokenising {source.label}", source.count, "documents")
    with bar, contextlib.ExitStack() as files:
        for batch in _batches(source.documents(), without_text):
            for document, ids in zip(
                batch, tokenizer.encode_batch([document.text for document in batch]), strict=True
            ):
                key = document.split, document.domain
                if key not in writers:
                    writers[key] = _Writer(
                        files.enter_context(open(directory / _file_name(*key), "wb")), dtype
                    )
                writers[key].append(ids, tokenizer.eos_id, len(document.text))
            bar.update(len(batch))
    _check_splits(source, {split for split, _ in writers}, without_text)
    entries = [
        {"split": split, "domain": domain, "file": _file_name(split, domain)} | writer.summary()
        for (split, domain), writer in sorted(writers.items())
    ]
    ignored = dict(source.account.ignored)
    if without_text:
        ignored[_WITHOUT_TEXT] = without_text.total()
    account = {"splits": source.account.splits, "ignored": ignored}
    index = json.dumps({"dtype": dtype.str, "streams": entries, "account": account}, indent=1)
    (directory / _INDEX).write_text(index, encoding="utf-8")


def _check_splits(source: Source, written: set[str], without_text: Mapping[str, int]) -> None:
    """Refuse splits of the source's own of which one holds nothing.

    The other alone is not what was meant.
    """
    for split in ("train", "validation"):
        if source.has_own_splits and written and split not in written:
            raise BadInput(
                f"data.sources: '{source.name}' has no document with text in its {split} split "
                f"({without_text[split]} without; {source.account.splits}); "
                "add some, or check data.text_key"
            )


def read(directory: Path, source: str) -> Iterator[tuple[str, str, Stream]]:
    """Split, domain and memory-mapped stream of everything that `write` left in a directory."""
    dtype, entries, _ = _read_index(directory)
    for entry in entries:
        file = directory / entry["file"]
        size = file.stat().st_size
        written = entry["tokens"] * dtype.itemsize
        if size != written:
            raise BadInput(
                f"data.cache_dir: '{file}' has {size} bytes and was written with {written}; "
                f"delete '{directory}'"
            )
        tokens_N = np.memmap(file, dtype, mode="r")
        yield (
            entry["split"],
            entry["domain"],
            Stream(source, tokens_N, entry["bytes"], entry["documents"], entry["sha256"]),
        )


def read_account(directory: Path) -> Account:
    """What `write` kept of how the source was divided, and of what it did not read."""
    _, _, account = _read_index(directory)
    return account


def _read_index(directory: Path) -> tuple[np.dtype, list[dict], Account]:
    """Type of the tokens, entries of the streams, and the account.

    Each stream is a file of the directory itself.
    """
    try:
        index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
        dtype = index["dtype"]
        entries = index["streams"]
        account = Account(**index.get("account", {"splits": "", "ignored": {}}))
        sound = dtype in _DTYPES and all(map(_is_entry, entries)) and _is_account(account)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise BadInput(
            f"data.cache_dir: '{directory / _INDEX}' is no table of token streams; "
            f"delete '{directory}'"
        )
    return np.dtype(dtype), entries, account


def _is_account(account: Account) -> bool:
    lines = [account.splits, *account.ignored]
    return all(isinstance(line, str) and line.isprintable() for line in lines) and all(
        type(count) is int for count in account.ignored.values()
    )


def _is_entry(entry: dict) -> bool:
    kinds = {key: type(value) for key, value in entry.items()}
    return (
        kinds == _KINDS
        and entry["file"] == _file_name(entry["split"], entry["domain"])
        and "/" not in entry["file"]
    )


def _batches(
    documents: Iterable[Document], without_text: collections.Counter[str]
) -> Iterator[list[Document]]:
    """Documents in lists that a tokenizer can work on in parallel, of about a megabyte each.

    Those of nothing, or nothing but white space, are counted by split in `without_text` instead.
    """
    batch = []
    size = 0
    for document in documents:
        if not document.text.strip():
            without_text[document.split] += 1
            continue
        batch.append(document)
        size += len(document.text)
        if size >= _BYTES_PER_BATCH:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def _file_name(split: str, domain: str) -> str:
    """A file name that no other domain has.

    It is no part of a path, and unlike others where capitals are not told apart.
    """
    if not domain:
        return f"{split}-text.bin"
    if _PLAIN_NAME.fullmatch(domain) and domain != "text":
        return f"{split}-{domain}.bin"
    plain = re.sub(r"[^a-z0-9]+", "_", domain.lower())[:64]
    return f"{split}-{plain}-{hashlib.sha256(domain.encode()).hexdigest()[:16]}.bin"
