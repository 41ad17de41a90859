"""The rows of a run: the same from shards as from text, each once an epoch, at any scale."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moe_erc
from moe_erc.data.text import prepare, train_batches, validation_batches

T = 4


def take(batches, count):
    return [next(batches) for _ in range(count)]


@pytest.fixture
def from_text(config, text_directory):
    """A corpus of text, with a held-out split, and its configuration."""
    config = dataclasses.replace(config, sources=(str(text_directory),), validation_fraction=0.1)
    return prepare(config), config


@pytest.fixture
def as_shards(from_text, write_shards, shard_config, tmp_path):
    """The streams of `from_text` cut into shards within documents, as a source of its own."""
    corpus, _ = from_text
    patterns = {}
    for split, streams in corpus.streams.items():
        [stream] = streams.values()
        shards = [[part] for part in np.array_split(stream.tokens_N[:], 5)]
        patterns[split] = write_shards(tmp_path / split, "flat", shards)
    return shard_config(
        patterns["train"], validation=(patterns["validation"].removeprefix("tokens:"),)
    )


@pytest.mark.parametrize("across", [True, False])
def test_batches_of_shards_are_those_of_the_text(from_text, as_shards, across):
    corpus, config = from_text
    corpus = prepare(dataclasses.replace(config, attend_across_documents=across))
    shards = prepare(dataclasses.replace(as_shards, attend_across_documents=across))
    [domain] = shards.streams["validation"]
    pairs = [
        (take(train_batches(corpus, T, 8, 3), 200), take(train_batches(shards, T, 8, 3), 200)),
        (
            list(validation_batches(corpus, "words", T, 8)),
            list(validation_batches(shards, domain, T, 8)),
        ),
    ]
    for expected, found in pairs:
        for batch, other in zip(expected, found, strict=True):
            assert set(batch) == set(other)
            for name in batch:
                np.testing.assert_array_equal(batch[name], other[name])


def test_every_row_once_an_epoch_whatever_reads_it(write_shards, shard_config, tmp_path):
    # The window with number i begins with token T i, and its first token is the id i.
    ids = np.zeros(4 * 60 + 1, int)
    ids[0 : 4 * 60 : 4] = np.arange(60)
    source = write_shards(tmp_path / "s", "flat", [[part] for part in np.array_split(ids, 7)])
    corpus = prepare(shard_config(source))
    seen = []
    row = 0
    # (batches, batch size, processes) of a run that is killed and started again.
    for batches, batch_size, processes in ((3, 8, 2), (5, 6, 3), (11, 4, 1), (1, 22, 2)):
        share = batch_size // processes
        readers = [
            train_batches(
                corpus, T, batch_size, 0, start_row=row, rows=range(share * p, share * (p + 1))
            )
            for p in range(processes)
        ]
        for _ in range(batches):
            for reader in readers:
                seen += next(reader)["inputs_BT"][:, 0].tolist()
        row += batches * batch_size
    assert row == len(seen) == 120
    for epoch in (seen[:60], seen[60:]):
        assert sorted(epoch) == list(range(60)) and epoch != list(range(60))
    assert seen[:60] != seen[60:]
    alone = train_batches(corpus, T, 1, 0)
    assert seen == [int(batch["inputs_BT"][0, 0]) for batch in take(alone, 120)]


SCALE = """
import pathlib, sys, time
from moe_erc.data.config import DataConfig
from moe_erc.data.text import describe, prepare, train_batches

def peak():
    # The peak of `resource` is inherited from the process that started this one.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])

before = peak()
config = DataConfig((f"tokens:{sys.argv[1]}/*.npy",), (), "bytes", "text", 0.001, 4096, sys.argv[2])
start = time.process_time()
corpus = prepare(config)
seconds = time.process_time() - start  # of this process, on a machine however busy
[stream] = corpus.streams["train"].values()
assert len(stream.tokens_N) > 9.9e12
batches = train_batches(corpus, 4096, 4, 0, start_row=2**30)
assert next(batches)["inputs_BT"].shape == (4, 4096)
print(seconds, peak() - before)
"""


def test_ten_thousand_shards_of_ten_trillion_tokens_open_at_once(tmp_path):
    (tmp_path / "s").mkdir()
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2 * 10**9)
    # Links are made faster than files.
    for number in range(10_000):
        os.link(tmp_path / "sparse", tmp_path / "s" / f"part-{number:05}.npy")
    found = subprocess.run(
        [sys.executable, "-c", SCALE, str(tmp_path / "s"), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(moe_erc.__file__).parents[1]), "PATH": ""},
    )
    assert found.returncode == 0, found.stderr
    seconds, kilobytes = map(float, found.stdout.split())
    print(f"{seconds:.2f} s, {kilobytes / 1024:.0f} MB")
    assert seconds < 5 and kilobytes < 200 * 1024
