"""Documents as flat arrays of token ids on disk, one array for each domain and split.

An end-of-document token follows each document. The ids are little-endian uint16, or uint32 for a
large vocabulary. Files are mapped into memory: a step reads only the pages of its own windows.

`index.json` is the table of contents. It also keeps the account of how the source was divided, so
that a run that reads the cache prints the same as the run that filled it.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moe_erc.checks import BadInput
from moe_erc.data import bars, forecast
from moe_erc.data.document import Account, Document
from moe_erc.data.shards.tokens import ShardTokens
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
# A domain of such a name is the name of its file, which is the same on every file system.
_PLAIN_NAME = re.compile(r"[a-z0-9_]{1,64}")


@dataclasses.dataclass(frozen=True)
class Stream:
    """All tokens of one domain and split of one source."""

    source: str  # as configured
    # A read-only memory map, or shards that are read by slices.
    tokens_N: np.ndarray | ShardTokens
    bytes: int | None  # of UTF-8 text, for bits per byte; None where only tokens are known
    documents: int
    sha256: str  # of the tokens; of shards, of their names and sizes and a sample
    # (first token, tokens) -> for each, whether it is the last of its document; None if that is the
    # end-of-document token of the tokenizer.
    ends: Callable[[int, np.ndarray], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token streams by split and domain, and how sources are mixed for training."""

    tokenizer: Tokenizer
    streams: Mapping[str, Mapping[str, Stream]]  # "train" or "validation" -> domain -> stream
    # Source -> its share of the training windows; empty means in proportion to size.
    weights: Mapping[str, int]
    identity: str  # differs when any batch could hold other tokens
    accounts: Mapping[str, Account] = dataclasses.field(default_factory=dict)  # by source
    # If False, batches have the number of each token's document.
    attend_across_documents: bool = True
    # By domain, the nats per token that no model can go below, where that is known.
    floors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    # Where the streams lie in the cache, for `text.reopen`.
    record: Mapping = dataclasses.field(default_factory=dict)


class _Writer:
    """A stream that is being written to an open file, and its counts for the index."""

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

    Raises:
      BadInput: if the source has splits of its own, and one has no document with text.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    writers: dict[tuple[str, str], _Writer] = {}
    without_text: collections.Counter[str] = collections.Counter()
    large = forecast.Forecast(source.name, source.bytes, dtype.itemsize)
    bar = bars.bar(f"Tokenising {source.label}", source.count, "documents")
    with bar, contextlib.ExitStack() as files:
        for batch in _batches(source.documents(), without_text):
            ids_of_batch = tokenizer.encode_batch([document.text for document in batch])
            for document, ids in zip(batch, ids_of_batch, strict=True):
                key = (document.split, document.domain)
                if key not in writers:
                    path = directory / _file_name(document.split, document.domain)
                    writers[key] = _Writer(files.enter_context(open(path, "wb")), dtype)
                writers[key].append(ids, tokenizer.eos_id, len(document.text))
                large.add(len(document.text), len(ids) + 1)
            bar.update(len(batch))
    _check_splits(source, {split for split, _ in writers}, without_text)
    entries = []
    for (split, domain), writer in sorted(writers.items()):
        entry = {"split": split, "domain": domain, "file": _file_name(split, domain)}
        entries.append(entry | writer.summary())
    ignored = dict(source.account.ignored)
    if without_text:
        ignored[_WITHOUT_TEXT] = without_text.total()
    account = {"splits": source.account.splits, "ignored": ignored}
    index = json.dumps({"dtype": dtype.str, "streams": entries, "account": account}, indent=1)
    (directory / _INDEX).write_text(index, encoding="utf-8")


def _check_splits(source: Source, written: set[str], without_text: Mapping[str, int]) -> None:
    """Refuse a source with splits of its own of which one is empty.

    The user did not mean to read the other one alone.
    """
    for split in ("train", "validation"):
        if source.has_own_splits and written and split not in written:
            raise BadInput(
                f"data.sources: '{source.name}' has no document with text in its {split} split "
                f"({without_text[split]} without; {source.account.splits}); "
                "add some, or check data.text_key"
            )


def read(directory: Path, source: str) -> Iterator[tuple[str, str, Stream]]:
    """(split, domain, memory-mapped stream) of everything that `write` left in a directory."""
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
        stream = Stream(source, tokens_N, entry["bytes"], entry["documents"], entry["sha256"])
        yield entry["split"], entry["domain"], stream


def read_account(directory: Path) -> Account:
    """The account of the source that `write` kept in a directory."""
    _, _, account = _read_index(directory)
    return account


def _read_index(directory: Path) -> tuple[np.dtype, list[dict], Account]:
    """(type of the tokens, entries of the streams, account of the source) of a directory."""
    try:
        index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
        dtype = index["dtype"]
        entries = index["streams"]
        account = Account(**index.get("account", {"splits": "", "ignored": {}}))
        is_sound = dtype in _DTYPES and all(map(_is_entry, entries)) and _is_account(account)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_sound = False
    if not is_sound:
        raise BadInput(
            f"data.cache_dir: '{directory / _INDEX}' is no table of token streams; "
            f"delete '{directory}'"
        )
    return np.dtype(dtype), entries, account


def _is_account(account: Account) -> bool:
    lines = [account.splits, *account.ignored]
    are_lines = all(isinstance(line, str) and line.isprintable() for line in lines)
    return are_lines and all(type(count) is int for count in account.ignored.values())


def _is_entry(entry: dict) -> bool:
    """Whether an entry has the right keys and types, and its file lies in the directory itself."""
    kinds = {key: type(value) for key, value in entry.items()}
    return (
        kinds == _KINDS
        and entry["file"] == _file_name(entry["split"], entry["domain"])
        and "/" not in entry["file"]
    )


def _batches(
    documents: Iterable[Document], without_text: collections.Counter[str]
) -> Iterator[list[Document]]:
    """Documents in lists of about a megabyte, which a tokenizer encodes in parallel.

    Documents that are empty or only white space are counted by split in `without_text` instead.
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
    """A file name that no other domain has, also where capitals are not told apart.

    It is never a path.
    """
    if not domain:
        return f"{split}-text.bin"
    if _PLAIN_NAME.fullmatch(domain) and domain != "text":
        return f"{split}-{domain}.bin"
    plain = re.sub(r"[^a-z0-9]+", "_", domain.lower())[:64]
    return f"{split}-{plain}-{hashlib.sha256(domain.encode()).hexdigest()[:16]}.bin"
