"""Training throughput of the whole optimizer step: forward, losses, backward, clipping, AdamW.

    python -m benchmarks.step [--shape=peer] [--peer] [--json=FILE]

For every E and K there is a row with ERC, one without (vanilla), both of `benchmarks/ours.py`, and
with --peer one of PyTorch's OLMoE with naive ERC (`benchmarks/peer.py`). Every row has a process of
its own, and they take turns (`benchmarks/__init__.py`). A matmul of the machine takes turns with
them; its best rate is the limit. Tokens are random and new in every step, so that routing stays
near balance and nothing is learned. FLOPs are those of matmuls alone. The backward counts twice the
forward, recomputation does not count, and all hinges of ERC count as active.
"""

import argparse
import json
import pathlib
import statistics

from rich.console import Console
from rich.table import Table

from benchmarks import Subject, cores, environment, take_turns
from benchmarks.limits import MATMUL
from moe_erc.launch import huge_pages

PEER = {
    "layers": 4,
    "width": 256,
    "heads": 4,
    "kv_heads": 4,
    "expert_width": 128,
    "vocab_size": 512,
}
DEBUG = {
    "layers": 2,
    "width": 32,
    "heads": 2,
    "kv_heads": 2,
    "expert_width": 16,
    "vocab_size": 64,
}
SHAPES = {  # model block, (sequences, length) of a step, (E, K) of the rows
    "peer": (PEER, (8, 256), ((16, 4), (64, 8))),
    "debug": (DEBUG, (2, 16), ((4, 2), (8, 2))),
}


def erc_flops(model, experts):
    """FLOPs of ERC in one step: M takes 2 E^2 D F a layer, and the backward twice that."""
    return 3 * 2 * experts**2 * model["width"] * model["expert_width"] * model["layers"]


def start(shape, with_peer):
    """{(E, K, method) or the name of a matmul: its subject}, started one after another."""
    sizes, (batch_size, length), rows = SHAPES[shape]
    subjects = {"XLA": Subject("benchmarks.limits:build_matmul")}
    if with_peer:
        subjects["PyTorch"] = Subject("benchmarks.peer:build_matmul", size=MATMUL, threads=cores())
    for experts, experts_per_token in rows:
        model = sizes | {"experts": experts, "experts_per_token": experts_per_token}
        options = {"model": model, "batch_size": batch_size, "length": length}
        row = (experts, experts_per_token)
        for method in ("erc", "vanilla"):
            subjects[*row, method] = Subject("benchmarks.ours:build", method=method, **options)
        if with_peer:
            subjects[*row, "peer"] = Subject("benchmarks.peer:build", threads=cores(), **options)
    return subjects


def summarize(shape, subjects, seconds):
    """(matmul rates by maker, rows) of the measurements, in plain values."""
    sizes, (batch_size, length), _ = SHAPES[shape]
    tokens = batch_size * length
    matmul = {}
    for name in subjects:
        if isinstance(name, str):
            matmul[name] = 2 * MATMUL**3 / min(seconds[name])
    rows = []
    for name in subjects:
        if name in matmul:
            continue
        experts, experts_per_token, method = name
        rates = [tokens / turn for turn in seconds[name]]
        # The peer computes the same, so its FLOPs are those of our count.
        flops = subjects[experts, experts_per_token, "erc"].facts["flops_per_token"]
        flops += erc_flops(sizes, experts) / tokens if method != "vanilla" else 0
        flop_rate = flops * statistics.median(rates)
        figures = {
            "experts": experts,
            "experts_per_token": experts_per_token,
            "method": method,
            "tokens_per_s": statistics.median(rates),
            "tokens_per_s_range": (min(rates), max(rates)),
            "flops_per_token": flops,
            "flops_per_s": flop_rate,
            "share_of_matmul": flop_rate / max(matmul.values()),
        }
        rows.append(subjects[name].facts | figures)
    speed = {
        (row["experts"], row["experts_per_token"], row["method"]): row["tokens_per_s"]
        for row in rows
    }
    for row in rows:
        peer = speed.get((row["experts"], row["experts_per_token"], "peer"))
        row["over_peer"] = row["tokens_per_s"] / peer if peer else None
    return matmul, rows


def show(matmul, rows):
    """Print the table, and the limit to which the rates are compared."""
    table = Table(
        "E",
        "K",
        "method",
        "tokens/s",
        "min-max",
        "MFLOP/token",
        "GFLOP/s",
        "share",
        "temp MB",
        "x peer",
    )
    for row in rows:
        low, high = row["tokens_per_s_range"]
        experts = row.get("experts_implementation")
        table.add_row(
            str(row["experts"]),
            str(row["experts_per_token"]),
            f"{row['method']} ({experts})" if experts else row["method"],
            f"{row['tokens_per_s']:,.0f}",
            f"{low:,.0f}-{high:,.0f}",
            f"{row['flops_per_token'] / 1e6:.1f}",
            f"{row['flops_per_s'] / 1e9:.1f}",
            f"{row['share_of_matmul']:.0%}",
            f"{row['temp_bytes'] / 1e6:.0f}" if "temp_bytes" in row else "",
            f"{row['over_peer']:.2f}" if row["over_peer"] else "",
        )
    console = Console(width=120)  # a narrower one would cut the numbers
    console.print(table)
    console.print(
        "share: of the faster float32 matmul;",
        ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in matmul.items()),
    )


def main():
    huge_pages.enable()  # as train.py has them
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--shape", choices=SHAPES, default="peer")
    parser.add_argument(
        "--peer", action="store_true", help="PyTorch's OLMoE as well; needs the hf extra"
    )
    parser.add_argument(
        "--json", type=pathlib.Path, help="also write rows, versions and device here"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of every row")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn; their median counts")
    flags = parser.parse_args()
    subjects = start(flags.shape, flags.peer)
    matmul, rows = summarize(flags.shape, subjects, take_turns(subjects, flags.rounds, flags.steps))
    for subject in subjects.values():
        subject.close()
    show(matmul, rows)
    if flags.json:
        found = {
            "benchmark": "step",
            "shape": flags.shape,
            "rounds": flags.rounds,
            "steps": flags.steps,
        }
        found |= {"environment": environment(), "matmul_flops_per_s": matmul, "rows": rows}
        flags.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
