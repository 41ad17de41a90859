"""The time of a training step by part of the model, forward and backward.

    python -m benchmarks.components [--experts=16] [--experts_per_token=4] [--method=erc]

Some steps of the shape `peer` of `benchmarks.step` are traced. Each operation of the compiled step
has the name of the traced line that it comes from. The time of an operation is without the
operations that run inside it. It is summed over all devices and threads, and includes the time of
waiting for other devices.
"""

import argparse
import collections
import glob
import gzip
import json
import pathlib
import tempfile

import jax
from rich.console import Console
from rich.table import Table

from benchmarks import ours
from benchmarks.compiled import hlo
from benchmarks.step import SHAPES
from moe_erc.launch import huge_pages

WARM_UP = 3  # steps
PARTS = (  # name, words of an operation's origin; see `part_of`
    ("attention projections", ("/attention/dot_general",)),
    ("attention", ("/attention/",)),
    ("experts", ("/moe/", "while")),
    ("experts, exchange of tokens", ("/moe/", "_gather")),
    ("experts, exchange of tokens", ("/moe/", "scatter")),
    ("routing, sorting", ("/moe/",)),
    ("head and loss", ("bcd,vd->bcv",)),
    ("norms, residuals, embedding", ("Transformer",)),
    ("losses on parameters, optimizer, metrics", ()),
)


def own_times(events):
    """{operation: microseconds}; the time of a span is without the spans inside it."""
    total = collections.Counter()
    open_spans = collections.defaultdict(list)
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        spans = open_spans[event["pid"], event["tid"]]
        while spans and spans[-1]["ts"] + spans[-1]["dur"] <= event["ts"]:
            spans.pop()
        if spans:
            total[spans[-1]["args"]["hlo_op"]] -= event["dur"]
        total[event["args"]["hlo_op"]] += event["dur"]
        spans.append(event)
    return total


def by_part(times, origins):
    """{(part, "forward" or "backward"): microseconds}."""
    found = collections.Counter()
    for operation, duration in times.items():
        origin = origins.get(operation, "")
        part = part_of(origin)
        found[part, "backward" if "transpose(" in origin else "forward"] += duration
    return found


def part_of(origin):
    """The first part whose words are all in the origin of an operation; the last part has none."""
    for name, words in PARTS:
        if all(word in origin for word in words):
            return name


def trace(compiled, state, batch, steps):
    """The spans of the operations in `steps` steps, after some steps that warm up."""
    for _ in range(WARM_UP):
        state, _ = compiled(state, batch())
    jax.block_until_ready(state)
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(steps):
                state, _ = jax.block_until_ready(compiled(state, batch()))
        (path,) = glob.glob(f"{directory}/**/*.trace.json.gz", recursive=True)
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
    spans = [event for event in events if event.get("ph") == "X"]
    return [span for span in spans if "hlo_op" in span.get("args", {})]


def main():
    huge_pages.enable()  # as train.py has them
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.components", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--experts_per_token", type=int, default=4)
    parser.add_argument("--method", default="erc", help="a file of configs/")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    flags = parser.parse_args()
    sizes, (batch_size, length), _ = SHAPES["peer"]
    model = sizes | {"experts": flags.experts, "experts_per_token": flags.experts_per_token}
    compiled, state, batch, _ = ours.compile_step(flags.method, model, batch_size, length)
    origins = hlo.origins(hlo.parse(compiled.as_text()))
    found = by_part(own_times(trace(compiled, state, batch, flags.steps)), origins)
    whole = sum(found.values())
    table = Table("part", "forward, ms a step", "backward", "share")
    for part in dict.fromkeys(name for name, _ in PARTS):
        forward = found[part, "forward"]
        backward = found[part, "backward"]
        table.add_row(
            part,
            *(f"{time / flags.steps / 1e3:.1f}" for time in (forward, backward)),
            f"{(forward + backward) / whole:.0%}",
        )
    table.add_section()
    table.add_row("all devices", f"{whole / flags.steps / 1e3:.0f}")
    Console(width=120).print(table)
    if flags.json:
        rows = [
            {"part": part, "pass": of, "ms": time / flags.steps / 1e3}
            for (part, of), time in found.items()
        ]
        flags.json.write_text(
            json.dumps({"benchmark": "components", "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
