"""The steps of a datatrove pipeline that tokenises: readers, the choice of a split, the writer.

    readers of the files of a part  ->  OfSplit  ->  Shards
    TfdsReader                      ->  OfSplit  ->  Shards

datatrove runs them in tasks on any of its executors; a task that ended is never run again. The
documents and tokens are those that a run on the same text sees. That is why plain text and JSON
lines are read as `text_files` reads them (datatrove leaves out lines and ends of files that it
cannot decode), and why documents are encoded by `tokenizer.py` (a tokenizer of datatrove turns text
that spells a control token into that token).
"""

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import IpcReader, ParquetReader, WarcReader
from datatrove.pipeline.readers.base import BaseDiskReader, BaseReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.tokens.tokenizer import TokenizedFile

from moe_erc.checks import BadInput
from moe_erc.data import shard_plan, text_files, tfds_source
from moe_erc.data.document import split_by_hash
from moe_erc.data.shard_plan import Part
from moe_erc.data.tokenizer import Tokenizer
from moe_erc.data.tokenizer import load as load_tokenizer

# Documents that are in memory at once. datatrove takes 10,000, which are gigabytes where documents
# are books.
_BATCH = 1000
# datatrove passes text as str. Bytes that are no UTF-8 come through and back as surrogates.
_BYTES = "surrogateescape"


class TextReader(BaseDiskReader):
    """Plain text and JSON lines, compressed or not."""

    name = "text"

    def read_file(self, filepath: str) -> Iterator[Document]:
        """The documents of one file."""
        name = self.data_folder.resolve_paths(filepath)
        with self.data_folder.open(filepath, "rb", compression="infer") as content:
            texts = text_files.texts(content, name, shard_plan.suffix(filepath), self.text_key)
            for number, text in enumerate(texts):
                yield _document(text, f"{filepath}/{number}")


class ParquetTexts(ParquetReader):
    """One column of Parquet files, whose absence is not taken for a file without rows."""

    def read_file(self, filepath: str) -> Iterator[Document]:
        """The documents of one file."""
        import pyarrow.parquet

        with self.data_folder.open(filepath, "rb") as file:
            columns = pyarrow.parquet.read_schema(file).names
        _check_key(self.text_key, columns, filepath)
        yield from super().read_file(filepath)


class TfdsReader(BaseReader):
    """Splits of a prepared TFDS data set, of which a task reads one range of the records."""

    name = "TFDS"

    def __init__(self, directory: str, splits: Sequence[str], text_key: str):
        super().__init__(text_key=text_key)
        self.directory = directory
        self.splits = tuple(splits)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """The documents of one task."""
        if data:
            yield from data
        builder = tfds_source.in_directory(Path(self.directory))
        for split in self.splits:
            texts = tfds_source.texts(builder, split, self.text_key, rank, world_size)
            for number, text in enumerate(texts):
                yield _document(text, f"{split}/{rank}/{number}")


class OfSplit(PipelineStep):
    """Keeps documents with text; of a source that is divided by hash, those of one split."""

    type = "filter"
    name = "documents of a split"

    def __init__(self, split: str, held_out: float | None):
        super().__init__()
        self.split = split
        self.held_out = held_out

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """The documents that are kept."""
        for document in data:
            text = _bytes_of(document.text)
            if not text.strip():
                self.stat_update("without text")
            elif self.held_out is None or split_by_hash(text, self.held_out) == self.split:
                yield document


class Shards(DocumentTokenizer):
    """Writes the shard of a task: `.ds`, `.ds.index` and `.ds.metadata`.

    Documents stay in their order; a run shuffles windows. A task without documents leaves no shard.
    """

    def __init__(self, folder: str, tokenizer: str, identity: str):
        """`identity` is what the tokenizer had when the tasks were planned."""
        super().__init__(folder, tokenizer, shuffle_documents=False, batch_size=_BATCH)
        self.identity = identity

    @cached_property
    def tokenizer(self) -> "_Encoder":
        """The tokenizer of a run, with the interface that datatrove asks for."""
        tokenizer = load_tokenizer(self.tokenizer_name_or_path)
        if tokenizer.identity != self.identity:
            raise BadInput(
                f"data.tokenizer: '{self.tokenizer_name_or_path}' has changed since the tasks were "
                "started; put the old file back"
            )
        return _Encoder(tokenizer)

    def write_unshuffled(self, data: Any, filename: str) -> TokenizedFile:
        """Tokenise documents into one file."""
        file = super().write_unshuffled(data, filename)
        if len(file) == 0:
            file.cleanup()
        return file


class _Encoded(NamedTuple):
    """The part of `tokenizers.Encoding` that datatrove reads."""

    ids: list[int]


class _Encoder:
    """The part of `tokenizers.Tokenizer` that datatrove calls."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def get_vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def encode_batch(self, texts: Sequence[str]) -> list[_Encoded]:
        found = self._tokenizer.encode_batch([_bytes_of(text) for text in texts])
        return [_Encoded([*ids_N.tolist(), self._tokenizer.eos_id]) for ids_N in found]


def check(parts: Sequence[Part], text_key: str) -> None:
    """Read the first document of every kind of file, so that no task is started in vain.

    Raises:
      BadInput: for a key that has no text, a file that cannot be read, or a missing package.
    """
    for part in parts:
        for kind, files in shard_plan.by_kind(part.files).items():
            path = files[0][0]
            # A .txt file is one document, which may be large and cannot be wrong.
            if shard_plan.suffix(path) != ".txt":
                _try(part, kind, path, text_key)


def pipeline(
    parts: Sequence[Part], output: DataFolder, tokenizer: str, identity: str, text_key: str
) -> list[PipelineStep]:
    """The steps of every part in turn; the lists of its files are written into the output."""
    steps: list[PipelineStep] = []
    for part in parts:
        for kind, files in shard_plan.by_kind(part.files).items():
            path = f"logs/files/{part.folder}-{kind}.txt"
            with output.open(path, "wt", encoding="utf-8") as file:
                file.write("".join(f"{name}\n" for name, _ in files))
            steps.append(_reader(part, kind, text_key, output.resolve_paths(path)))
        if part.records:
            splits = [split for split, _ in part.records]
            steps.append(TfdsReader(part.place, splits, text_key))
        steps.append(OfSplit(part.split, part.held_out))
        steps.append(Shards(output.resolve_paths(part.folder), tokenizer, identity))
    return steps


def _reader(part: Part, kind: str, text_key: str, paths_file: str | None) -> BaseDiskReader:
    """The reader of one kind of file, which takes them in the order of `paths_file`."""
    adapter = None if kind == "text" else _adapt
    return _READERS[kind](part.place, paths_file, text_key=text_key, adapter=adapter)


def _try(part: Part, kind: str, path: str, text_key: str) -> None:
    try:
        next(iter(_reader(part, kind, text_key, None).read_file(path)), None)
    except BadInput:
        raise
    except Exception as error:  # of any library that reads or unpacks files
        raise BadInput(
            f"data.sources: '{path}' in '{part.source}' cannot be read ({error}); "
            "fetch it again, or install what reads it"
        ) from error


def _adapt(reader: BaseReader, data: dict, path: str, number: int | str) -> dict:
    """The text of a row or record, for datatrove's own readers; a row without text is left out."""
    _check_key(reader.text_key, data, path)
    text = data[reader.text_key]
    if text is not None and not isinstance(text, str):
        raise BadInput(
            f"data.text_key: '{reader.text_key}' of '{path}' is no text; set it to one that is"
        )
    return {"text": text, "id": f"{path}/{number}"}


def _check_key(text_key: str, keys: Any, path: str) -> None:
    if text_key not in keys:
        raise BadInput(
            f"data.text_key: '{path}' has no '{text_key}'; set it to one of {sorted(keys)}"
        )


def _document(text: bytes, identity: str) -> Document:
    return Document(text.decode(errors=_BYTES), identity)


def _bytes_of(text: str) -> bytes:
    try:
        return text.encode(errors=_BYTES)
    except UnicodeEncodeError:  # half of a surrogate pair, of a reader of datatrove
        return text.encode(errors="replace")


_READERS = {
    "text": TextReader,
    "parquet": ParquetTexts,
    "arrow": partial(IpcReader, stream=True),  # the form in which Hugging Face saves
    "warc": WarcReader,
}
