"""Token shards of every format, written byte by byte, and the stream that they hold."""

import dataclasses
import struct

import fsspec
import numpy as np
import pytest

from moe_erc.data.shards.options import TokenOptions

EOS = 256  # of the byte tokenizer


def _flat(path, documents, dtype="<u2"):
    np.concatenate(documents).astype(dtype).tofile(path)


def _numpy(path, documents, dtype="<u2"):
    with open(path, "wb") as file:
        np.save(file, np.concatenate(documents).astype(dtype))


def _datatrove(path, documents, dtype="<u2", tokenizer="Unknown Tokenizer|2"):
    _flat(path, documents, dtype)
    ends = np.cumsum([len(document) for document in documents])
    path.with_name(path.name + ".index").write_bytes(ends.astype("<u8").tobytes())
    lines = f"{tokenizer}|{np.dtype(dtype).itemsize}\n{ends[-1]}\n{ends[-1]} T"
    path.with_name(path.name + ".metadata").write_text(lines)


def _megatron(path, documents, dtype="<u2", per_document=1):
    """Every document is written as `per_document` sequences."""
    _flat(path, documents, dtype)
    sequences = []
    boundaries = [0]
    for document in documents:
        parts = np.array_split(document, per_document)
        sequences += [len(part) for part in parts]
        boundaries.append(len(sequences))
    size = np.dtype(dtype).itemsize
    pointers = np.cumsum([0, *sequences[:-1]]) * size
    code = {"<u2": 8, "<i4": 4}[dtype]
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(boundaries))
    tables = [np.array(sequences, "<i4"), pointers.astype("<i8"), np.array(boundaries, "<i8")]
    index = head + b"".join(table.tobytes() for table in tables)
    path.with_suffix(".idx").write_bytes(index)


WRITERS = {
    "flat": (".npy", _flat),
    "numpy": (".npy", _numpy),
    "datatrove": (".ds", _datatrove),
    "megatron": (".bin", _megatron),
}


@pytest.fixture
def write_shards():
    """write(directory, kind, documents of each shard, **options) -> the source of these shards."""

    def write(directory, kind, shards, **options):
        directory.mkdir(parents=True, exist_ok=True)
        suffix, writer = WRITERS[kind]
        for number, documents in enumerate(shards):
            writer(directory / f"{number:03}{suffix}", documents, **options)
        return f"tokens:{directory}/*{suffix}"

    return write


@pytest.fixture
def documents():
    """7 documents in 3 shards, each closed by a token: 3 + 1 + 4, 2 + 12, 5 + 20 tokens."""
    random = np.random.default_rng(0)

    def document(length):
        return np.append(random.integers(0, 256, length - 1), EOS)

    shards = [(3, 1, 4), (2, 12), (5, 20)]
    return [[document(length) for length in lengths] for lengths in shards]


@pytest.fixture
def stream(documents):
    """All tokens of `documents`, end to end."""
    return np.concatenate([document for shard in documents for document in shard])


@pytest.fixture
def shard_config(config):
    """shard_config(source, …, **options of data.tokens) -> a configuration with T = 4."""

    def make(*sources, validation_fraction=0.0, **options):
        return dataclasses.replace(
            config,
            sources=sources,
            validation_fraction=validation_fraction,
            tokens=TokenOptions(**options),
        )

    return make


@pytest.fixture
def bucket():
    """An object store in memory, empty: put(directory) copies files to memory://bucket/."""
    store = fsspec.filesystem("memory")
    store.store.clear()

    def put(directory):
        for path in directory.iterdir():
            store.pipe_file(f"memory://bucket/{path.name}", path.read_bytes())
        return store

    yield put
    store.store.clear()
