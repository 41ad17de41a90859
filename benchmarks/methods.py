"""Every method beside vanilla, at one model shape: step time, memory, parameters and FLOPs.

    python -m benchmarks.methods [--shape=peer] [--methods=erc,aoe] [--json=FILE]

Every config has a process of its own, and they take turns, as in `benchmarks/step.py`. Memory is
that of one device by the compiled program: arguments + outputs - aliased + temporaries + program.
FLOPs are the model's matmuls, the backward counted twice the forward, at the largest number of
experts that a token may meet (top-p: 2 K; routing-free: its target K). The work of losses is only
in the time. Tokens are random. The number of experts that run is measured after a warm-up, and
shown beside each method. CompeteSMoE is measured with no layer competing and with the largest
number of competing layers; its expected step is interpolated between both.
"""

import argparse
import json
import pathlib
import statistics

from rich.console import Console
from rich.table import Table

from benchmarks import Subject, environment, take_turns
from benchmarks.limits import MATMUL
from benchmarks.ours import configure
from benchmarks.step import SHAPES
from moe_erc.launch import huge_pages
from moe_erc.model.config import ModelConfig

EXPERTS = {"peer": (16, 4), "debug": (8, 2)}  # E, K
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def find_methods():
    """{name: module below configs}, vanilla first."""
    methods = {"vanilla": "vanilla"}
    for folder in ("", "combinations"):
        for path in sorted((CONFIGS / folder).glob("*.py")):
            if path.stem not in ("__init__", "base", "sizes"):
                methods[path.stem] = ".".join(path.relative_to(CONFIGS).with_suffix("").parts)
    return methods


METHODS = find_methods()
COMPETING = "competesmoe"
NONE = "competesmoe, none"
MOST = "competesmoe, most"
# Rates of competition; in a step at most routers.competition.max_layers layers compete.
RATES = {NONE: 0.0, MOST: 1.0}


def model_of(shape):
    """The sizes of the model block."""
    sizes, _, _ = SHAPES[shape]
    experts, experts_per_token = EXPERTS[shape]
    return sizes | {"experts": experts, "experts_per_token": experts_per_token}


def start(shape, methods, warm_up):
    """{method or "XLA": its subject}, started one after another."""
    batch_size, length = SHAPES[shape][1]
    options = {
        "model": model_of(shape),
        "batch_size": batch_size,
        "length": length,
        "warm_up": warm_up,
    }
    subjects = {"XLA": Subject("benchmarks.limits:build_matmul")}
    for method in methods:
        changes = {method: {}}
        if method == COMPETING:
            changes = {name: {"routers.competition.rate": rate} for name, rate in RATES.items()}
        for name, change in changes.items():
            subjects[name] = Subject(
                "benchmarks.ours:build", method=METHODS[method], changes=change, **options
            )
    return subjects


def competing_share(config):
    """How many layers compete in a step on average, as a share of the most that may."""
    most = min(config.router.max_layers, config.layers)
    return config.router.expected_share(config) * config.layers / most


def between(none, most, share):
    """The expected step of CompeteSMoE; each competing layer adds the same time and FLOPs."""

    def blend(low, high):
        return low + share * (high - low)

    return none | {
        "method": COMPETING,
        "step_s": [blend(*turn) for turn in zip(none["step_s"], most["step_s"], strict=True)],
        "flops_per_token": blend(none["flops_per_token"], most["flops_per_token"]),
    }


def summarize(shape, subjects, seconds):
    """(matmul rate, rows) of the measurements, in plain values."""
    rows = {}
    for name, subject in subjects.items():
        if name != "XLA":
            rows[name] = {"method": name, "step_s": seconds[name]} | subject.facts
    if NONE in rows:
        share = competing_share(ModelConfig.of(configure(COMPETING, model_of(shape))))
        rows[COMPETING] = between(rows[NONE], rows[MOST], share)
    vanilla = rows["vanilla"]
    time = statistics.median(vanilla["step_s"])
    memory = vanilla["allocated_bytes"]
    for row in rows.values():
        row["median_step_s"] = statistics.median(row["step_s"])
        row["over_vanilla"] = {
            "time": row["median_step_s"] / time,
            "time_range": (min(row["step_s"]) / time, max(row["step_s"]) / time),  # of turns
            "memory": row["allocated_bytes"] / memory,
        }
    return 2 * MATMUL**3 / min(seconds["XLA"]), list(rows.values())


def aoe_extra_flops(model, tokens):
    """FLOPs of a step that AoE spends on experts that it scores and does not use.

    They are 2 N (E - K) D r a layer, and twice that in the backward.
    """
    unused = model["experts"] - model["experts_per_token"]
    return 3 * 2 * tokens * unused * model["width"] * model["gate_rank"] * model["layers"]


def explain_aoe(aoe, vanilla, tokens, matmul):
    """The extra work of AoE by its formula, beside the measurement."""
    extra = aoe_extra_flops(aoe["model"], tokens)
    step = vanilla["median_step_s"]
    share = extra / (vanilla["flops_per_token"] * tokens)
    at_rate = extra / matmul
    measured = aoe["median_step_s"] - step
    return (
        f"aoe: 2 N (E - K) D r of each layer, x 3, are {extra / 1e9:.3g} GFLOP, "
        f"{share:.0%} of vanilla's step; at the matmul rate of {matmul / 1e9:.0f} GFLOP/s "
        f"{at_rate * 1e3:.3g} ms, {at_rate / step:.0%} of its time; "
        f"measured {measured * 1e3:+.3g} ms, {measured / step:+.0%}"
    )


def experts_run(row):
    """Experts of a token: the mean over steps since the warm-up, and the range if steps differ."""
    low, high = row["experts_per_token_range"]
    mean = f"{row['router/experts_per_token']:.1f}"
    return f"{mean} ({low:.1f}-{high:.1f})" if high - low > 0.05 else mean


def show(rows, tokens, matmul):
    """Print the table, and lines on what does not fit into it."""
    sizes = ("x memory", "MB", "parameters", "active", "MFLOP/token", "experts/token")
    table = Table("method", "x time", "min-max", "ms/step", *sizes)
    for row in rows:
        over = row["over_vanilla"]
        low, high = over["time_range"]
        table.add_row(
            row["method"],
            f"{over['time']:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{row['median_step_s'] * 1e3:,.0f}",
            f"{over['memory']:.2f}",
            f"{row['allocated_bytes'] / 1e6:,.1f}",
            f"{row['parameters']:,}",
            f"{row['active_parameters']:,}",
            f"{row['flops_per_token'] / 1e6:.2f}",
            experts_run(row),
        )
    console = Console(width=140)  # a narrower one would cut the numbers
    console.print(table)
    console.print(
        "time: median of turns, and their range, over vanilla's median; "
        f"{tokens:,} tokens a step; memory of one device"
    )
    by_name = {row["method"]: row for row in rows}
    if MOST in by_name:
        none, most, expected = (by_name[name]["median_step_s"] for name in (NONE, MOST, COMPETING))
        share = (expected - none) / (most - none) if most != none else 0
        console.print(
            f"{COMPETING}: the expected step, "
            f"{share:.1%} of the way from no layer competing to the most"
        )
    if "aoe" in by_name:
        console.print(explain_aoe(by_name["aoe"], by_name["vanilla"], tokens, matmul))


def names(text):
    """Methods from the command line; vanilla, to which the others are compared, comes first."""
    chosen = text.split(",")
    unknown = [name for name in chosen if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: none of {', '.join(METHODS)}")
    return list(dict.fromkeys(["vanilla", *chosen]))


def main():
    huge_pages.enable()  # as train.py has them
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--shape", choices=EXPERTS, default="peer")
    parser.add_argument(
        "--methods", type=names, default=list(METHODS), help="vanilla and these; all if not given"
    )
    parser.add_argument(
        "--json", type=pathlib.Path, help="also write rows, versions and device here"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of every method")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn; their median counts")
    parser.add_argument(
        "--warm-up", type=int, default=50, help="steps before the first turn: routing settles"
    )
    flags = parser.parse_args()
    batch_size, length = SHAPES[flags.shape][1]
    subjects = start(flags.shape, flags.methods, flags.warm_up)
    matmul, rows = summarize(flags.shape, subjects, take_turns(subjects, flags.rounds, flags.steps))
    for subject in subjects.values():
        subject.close()
    show(rows, batch_size * length, matmul)
    if flags.json:
        found = {
            "benchmark": "methods",
            "shape": flags.shape,
            "rounds": flags.rounds,
            "steps": flags.steps,
        }
        found |= {
            "warm_up": flags.warm_up,
            "environment": environment(),
            "matmul_flops_per_s": matmul,
            "rows": rows,
        }
        flags.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
