"""Our train step beside MaxText's, both compiled for v5p 4x4x4: one table in Markdown.

    python -m benchmarks.beside_maxtext [--sizes=olmoe_1b_7b,3b,15b] [--json=FILE]

Ours is compiled now, by `benchmarks.compile_ahead` with the defaults of each size and ERC. MaxText
is as measured; its own seconds are in `MAXTEXT`. Nothing is run: seconds are the estimate of
`compiled/clock.py`, which serves to compare programs and is no speed. Results are kept as JSON
lines, by default in runs/searches, and a size that is kept is not compiled again.
"""

import argparse
import pathlib

from benchmarks.compiled import search
from benchmarks.compiled.clock import Seconds
from benchmarks.compiled.report import gib
from configs import erc, sizes
from moe_erc.checks import one_of
from moe_erc.launch import command_line

TOPOLOGY = "v5p:4x4x4"
# MaxText 0.2.5 with its decoder qwen3_moe at the same sizes: dropless megablox with its default
# tiles, splash attention, full recomputation, AdamW, FSDP over 64 chips. jax 0.11.2, libtpu
# 0.0.48.1; written down on 2026-11-28. Its 3b was not compiled.
MAXTEXT = {
    "olmoe_1b_7b": {
        "estimate": {
            "step": {"best": 3.5, "likely": 3.97, "worst": 4.7},
            "cycles": {"likely": 1.48},
            "kernels": {"likely": 2.14},
            "rows": {"likely": 0.25},
            "collectives": {"likely": 0.10},
        },
        "allocated": 23.1 * 2**30,
        "sent": 54.6e9,
    },
    "15b": {
        "estimate": {
            "step": {"best": 3.1, "likely": 3.45, "worst": 4.0},
            "cycles": {"likely": 1.42},
            "kernels": {"likely": 1.51},
            "rows": {"likely": 0.30},
            "collectives": {"likely": 0.22},
        },
        "allocated": 22.7 * 2**30,
        "sent": 117.8e9,
    },
}
PARTS = ("cycles", "kernels", "rows", "collectives")
HEADING = (
    "",
    "program",
    "estimate, s",
    "best to worst",
    *PARTS,
    "allocated, GiB",
    "sent, GB",
)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.beside_maxtext", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--sizes",
        default="olmoe_1b_7b,3b,15b",
        help="of configs/sizes.py, separated by commas",
    )
    parser.add_argument(
        "--json",
        type=pathlib.Path,
        default=pathlib.Path("runs/searches/beside_maxtext.jsonl"),
        help="keep results in this file, as JSON lines",
    )
    flags = parser.parse_args()
    rows = []
    with command_line.refusing_bad_input():
        names = flags.sizes.split(",")
        for size in names:
            one_of("--sizes", size, sizes.MODELS)
        for size in names:
            ours = compiled(size, erc.get_config(size), flags.json)
            rows += rows_of(size, ours, MAXTEXT.get(size))
            print(f"{size}: {search.describe(ours)}", flush=True)
    print(markdown([HEADING, *rows]))


def compiled(size, config, path):
    """What was found of our step."""
    cut = search.Cut(
        config.mesh.data, config.mesh.expert, config.model.remat, config.train.micro_batches
    )
    arguments = [f"--config=configs/erc.py:{size}", f"--topology={TOPOLOGY}"]
    kept = search.Kept(path, search.key(config, arguments))
    return kept.or_measured(cut, lambda cut: search.compile_apart(arguments))


def rows_of(size, ours, maxtext):
    """The rows of one size, as cells; without MaxText's if it was not compiled.

    A step that does not fit or fails has the reason in place of its figures.
    """
    if ours["outcome"] != search.FITS:
        reason = (search.describe(ours), *[""] * (len(HEADING) - 3))
        rows = [(size, "ours", *reason)]
        return [*rows, ("", "MaxText", *cells(maxtext))] if maxtext else rows
    rows = [(size, "ours", *cells(ours))]
    if maxtext:
        ratio = ours["estimate"]["step"]["likely"] / maxtext["estimate"]["step"]["likely"]
        memory = ours["allocated"] / maxtext["allocated"]
        sent = ours["sent"] / maxtext["sent"]
        blank = [""] * (1 + len(PARTS))
        rows.append(("", "MaxText", *cells(maxtext)))
        ratios = (f"{ratio:.2f}", *blank, f"{memory:.2f}", f"{sent:.2f}")
        rows.append(("", "ours / MaxText", *ratios))
    return rows


def cells(found):
    step = Seconds(**found["estimate"]["step"])
    parts = [f"{found['estimate'][part]['likely']:.2f}" for part in PARTS]
    return (
        f"{step.likely:.2f}",
        f"{step.best:.1f}-{step.worst:.1f}",
        *parts,
        gib(found["allocated"]),
        f"{found['sent'] / 1e9:.1f}",
    )


def markdown(rows):
    """A table of Markdown; the first row is its heading."""
    lines = []
    for row in rows:
        escaped = [cell.replace("|", "\\|") for cell in row]
        lines.append("| " + " | ".join(escaped) + " |")
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
