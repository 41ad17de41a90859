"""The speed of the data pipeline, in tokens per second.

    python -m benchmarks.input [--config=FILE:SIZE] [--batches=200] [--json=FILE]

The corpus of the config is prepared before. Its batches are made by this process, in the order of
training, and put on its devices. Every process of a pod makes only its own rows, so the speed of a
pod is this speed times the number of its processes.
"""

import functools
import json
import pathlib
import statistics
import time

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks import environment
from moe_erc import sharding
from moe_erc.data import text
from moe_erc.launch import command_line

BATCHES = flags.DEFINE_integer("batches", 200, "batches of a turn", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "turns", lower_bound=1)
JSON = flags.DEFINE_string("json", None, "also write figures, versions and device here")


def main(_):
    config = flags.FLAGS.config
    with command_line.refusing_bad_input():
        length = config.data.sequence_length
        batch_size = config.train.batch_size
        sharding.use_cpu_cores(batch_size)
        mesh = sharding.make_mesh(-1, 1)
        corpus = text.prepare(text.DataConfig(**config.data))
    rows = sharding.local_rows(mesh, batch_size)
    batches = text.train_batches(corpus, length, batch_size, config.seed, rows=rows)
    put = functools.partial(sharding.put_batch, mesh)
    rates = {"made": [], "made and put": []}
    tokens = BATCHES.value * batch_size * length
    next(batches)  # the first one opens files
    for _ in range(ROUNDS.value):
        start = time.perf_counter()
        for _ in range(BATCHES.value):
            next(batches)
        rates["made"].append(tokens / (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(BATCHES.value):
            jax.block_until_ready(put(next(batches)))
        rates["made and put"].append(tokens / (time.perf_counter() - start))
    table = Table("batches", f"{batch_size} x {length}", "M tokens/s", "min-max")
    for name, found in rates.items():
        table.add_row(
            name,
            "",
            f"{statistics.median(found) / 1e6:.2f}",
            f"{min(found) / 1e6:.2f}-{max(found) / 1e6:.2f}",
        )
    Console(width=120).print(table)
    if JSON.value:
        found = {"benchmark": "input", "environment": environment(), "tokens_per_s": rates}
        pathlib.Path(JSON.value).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command_line.run(main, default_config="configs/erc.py:tiny")
