"""The speed and the memory of reading token shards, from a disk and from an object store.

    python -m benchmarks.shards [--latency=50] [--batches=10] [--json=FILE]

Steps of 3.1 M tokens (768 x 4,096) are read from flat arrays of random uint16, by a process that
reads all rows of a step and by one of 16, which reads its own 48. The object store is the same
files behind the latency of every request. Each case has a process of its own, which does nothing
else. Batches are made as in training, and dropped.
"""

import json
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time

import fsspec
import numpy as np
from absl import flags
from fsspec.implementations.local import LocalFileSystem
from rich.console import Console
from rich.table import Table

from benchmarks import environment
from moe_erc.data import text
from moe_erc.launch import command_line

LATENCY = flags.DEFINE_float("latency", 50, "of a request to the object store, in milliseconds")
BATCHES = flags.DEFINE_integer("batches", 10, "steps that are timed", lower_bound=1)
JSON = flags.DEFINE_string("json", None, "also write figures and versions here")

LENGTH = 4096
BATCH_SIZE = 768
SHARDS = 32
TOKENS = 2**24  # of a shard
PROCESSES = 16  # of a pod of 64 chips


class Slow(LocalFileSystem):
    """The local files as an object store, of which every request waits."""

    protocol = "memory"
    latency = 0.0  # seconds

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol("/" + str(path).removeprefix("memory://").lstrip("/"))

    def glob(self, path, **kwargs):
        time.sleep(self.latency)
        return super().glob(path, **kwargs)

    def cat_file(self, path, start=None, end=None, **kwargs):
        time.sleep(self.latency)
        with open(self._strip_protocol(path), "rb") as file:
            file.seek(start)
            return file.read(end - start)


def write(directory):
    """Writes the shards: 1 GB."""
    random = np.random.default_rng(0)
    for number in range(SHARDS):
        tokens_N = random.integers(0, 256, TOKENS, dtype=np.uint16)
        tokens_N.tofile(directory / f"part-{number:02}.npy")


def peak_megabytes():
    """The largest resident memory of this process so far; Linux alone says it of this process."""
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measure(pattern, rows, latency, batches):
    """Seconds to open, of the first batch and of each further one, and the peak of memory."""
    Slow.latency = latency / 1000
    fsspec.register_implementation("memory", Slow, clobber=True)
    before = peak_megabytes()
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        config = text.DataConfig((pattern,), (), "bytes", "text", 0.001, LENGTH, cache)
        corpus = text.prepare(config)
        opened = time.perf_counter()
        found = text.train_batches(corpus, LENGTH, BATCH_SIZE, 0, rows=range(rows))
        next(found)
        first = time.perf_counter()
        seconds = []
        for _ in range(batches):
            begun = time.perf_counter()
            next(found)
            seconds.append(time.perf_counter() - begun)
    return {
        "open": opened - start,
        "first": first - opened,
        # Batches that are ready come at once and those behind them later, so that the mean counts.
        "step": statistics.mean(seconds),
        "megabytes": peak_megabytes() - before,
        "tokens_per_s": rows * LENGTH / statistics.mean(seconds),
    }


def main(_):
    found = {}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        write(pathlib.Path(directory))
        places = {
            "disk": f"tokens:{directory}/*.npy",
            f"object store, {LATENCY.value:g} ms": f"tokens:memory://{directory}/*.npy",
        }
        for place, pattern in places.items():
            for rows in (BATCH_SIZE, BATCH_SIZE // PROCESSES):
                arguments = (pattern, rows, LATENCY.value, BATCHES.value)
                with context.Pool(1) as pool:
                    found[f"{place}, {rows} rows"] = pool.apply(measure, arguments)
    table = Table("place", "open s", "first step s", "step s", "M tokens/s", "MB")
    for name, case in found.items():
        table.add_row(
            name,
            f"{case['open']:.2f}",
            f"{case['first']:.2f}",
            f"{case['step']:.2f}",
            f"{case['tokens_per_s'] / 1e6:.2f}",
            f"{case['megabytes']:.0f}",
        )
    Console(width=120).print(table)
    if JSON.value:
        written = {"benchmark": "shards", "environment": environment(), "cases": found}
        pathlib.Path(JSON.value).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    # The processes of the cases read the same flags.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    command_line.run(main)
