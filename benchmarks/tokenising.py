"""The speed of tokenising on one core: into the cache of a run, and into token shards.

    python -m benchmarks.tokenising [--megabytes=24] [--vocab_size=8192] [--json=FILE]

The text is installed Python source, as one file of JSON lines. The tokenizer is learned from a
quarter of it. Seconds are those of the processor, so that other work on the machine does not count.
Shards of a source without a held-out split read all text twice, once for each split.
"""

import json
import os
import pathlib
import tempfile
import time

from absl import flags
from datatrove.io import get_datafolder
from loguru import logger
from rich.console import Console
from rich.table import Table

from benchmarks import environment
from moe_erc.data import bpe, datatrove_steps, embedded, shard_plan, sources, streams
from moe_erc.data import tokenizer as tokenizers
from moe_erc.data.config import DataConfig
from moe_erc.data.python_source import installed_trees
from moe_erc.launch import command_line

MEGABYTES = flags.DEFINE_integer("megabytes", 24, "of text", lower_bound=1)
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 8192, "of the learned tokenizer")
JSON = flags.DEFINE_string("json", None, "also write figures, versions and device here")


def main(_):
    os.environ["RAYON_NUM_THREADS"] = "1"  # `tokenizers` reads it when it starts its threads
    logger.remove()  # datatrove logs every file
    measured = []
    with tempfile.TemporaryDirectory() as directory, command_line.refusing_bad_input():
        root = pathlib.Path(directory)
        texts = write_text(root / "text")
        learned = root / "tokenizer.json"
        bpe.save(bpe.train(texts[::4], VOCAB_SIZE.value), learned)
        for spec in (str(learned), "bytes"):
            measured += measure(root, spec)
    table = Table("tokenizer", "into", "tokens/s", "MB of text/s", "bytes of text per token")
    for row in measured:
        rate = row["tokens"] / row["seconds"]
        speed = row["bytes"] / row["seconds"] / 1e6
        per_token = row["bytes"] / row["tokens"]
        table.add_row(
            row["tokenizer"], row["into"], f"{rate:,.0f}", f"{speed:.1f}", f"{per_token:.2f}"
        )
    Console(width=120).print(table)
    if JSON.value:
        found = {"benchmark": "tokenising", "environment": environment(), "rows": measured}
        pathlib.Path(JSON.value).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def write_text(directory):
    """Writes one file of documents, and returns them."""
    directory.mkdir()
    texts = []
    size = 0
    with open(directory / "text.jsonl", "w", encoding="utf-8") as file:
        for document in embedded.documents(installed_trees()):
            texts.append(document.text.decode(errors="replace"))
            file.write(json.dumps({"text": texts[-1]}) + "\n")
            size += len(document.text)
            if size >= MEGABYTES.value * 1e6:
                break
    return texts


def measure(root, spec):
    """The rows of one tokenizer: into the cache, and into shards."""
    name = str(root / "text")
    config = DataConfig((name,), (), spec, "text", 0.02, 64, "")
    tokenizer = tokenizers.load(spec)
    kind = "bytes" if spec == "bytes" else f"{tokenizer.vocab_size} tokens"
    cache = root / f"cache of {kind}"
    cache.mkdir()
    start = time.process_time()
    streams.write(cache, sources.open_source(name, config), tokenizer)
    seconds = {"cache": time.process_time() - start}
    output = get_datafolder(str(root / f"shards of {kind}"))
    parts = list(shard_plan.parts_of(config))
    steps = datatrove_steps.pipeline(parts, output, spec, tokenizer.identity, "text")
    start = time.process_time()
    data = None
    for step in steps:
        data = step(data, 0, 1)
    seconds["shards"] = time.process_time() - start
    written = [stream for _, _, stream in streams.read(cache, name)]
    tokens = sum(len(stream.tokens_N) for stream in written)
    text_bytes = sum(stream.bytes for stream in written)
    facts = {"tokenizer": kind, "tokens": tokens, "bytes": text_bytes}
    return [facts | {"into": into, "seconds": taken} for into, taken in seconds.items()]


if __name__ == "__main__":
    command_line.run(main)
