"""The experts of one MoE layer by implementation, routing and number: time and memory.

    python -m benchmarks.experts [--experts=8,64,256] [--tokens=4096] [--json=FILE]

K is 8. The tokens meet E experts, each a SwiGLU of width F, over all devices. Routing "balanced"
spreads the rows evenly, "zipf" chooses expert e with a probability like 1 / (e + 1), and "one"
sends every row to one expert. FLOPs are 6 D F a row, and three times that with gradients;
recomputation does not count. Bytes are weights, tokens and their gradients, once each. The share is
the time that the machine's own matmul and copy would take, by the time measured; both are measured
in the same turns.
"""

import argparse
import functools
import itertools
import json
import pathlib
import statistics
import types

import jax
import numpy as np
from jax.sharding import NamedSharding
from rich.console import Console
from rich.table import Table

from benchmarks import environment, limits, take_turns, timed
from benchmarks.compiled.costs import memory
from moe_erc import sharding
from moe_erc.launch import huge_pages
from moe_erc.moe import experts, parallel, routing

K = 8
ROUTINGS = ("balanced", "zipf", "one")
# Off a TPU these do E / K times the work. They are measured only for few experts and balanced
# routing.
EXPANDING = ("dense", "ragged")


def route(kind, tokens, count):
    """(N, K) experts of every token; except in "one", those of a token are distinct."""
    rng = np.random.default_rng(0)
    if kind == "one":
        return np.zeros((tokens, K), np.int32)
    odds_E = np.ones(count) if kind == "balanced" else 1 / (np.arange(count) + 1)
    # The K largest of log odds plus Gumbel noise are a draw without replacement.
    noisy_NE = np.log(odds_E) + rng.gumbel(size=(tokens, count))
    return np.argsort(-noisy_NE, axis=1)[:, :K].astype(np.int32)


def build(implementation, kind, count, shape, gradients, dtype=np.float32):
    """(step, temporary bytes) of one layer; shape is (N, D, F).

    Weights of assignments stay float32.
    """
    tokens, width, hidden = shape
    rng = np.random.default_rng(1)
    mesh = sharding.make_mesh(1, jax.device_count())
    run = functools.partial(
        experts.implementation(implementation, jax.default_backend()), experts.weighed
    )

    def normal(*of):
        return (0.1 * rng.standard_normal(of, np.float32)).astype(dtype)

    on_host = {
        "x": normal(tokens, 1, width),
        "weights": normal(tokens, 1, K).astype(np.float32),
        "experts": route(kind, tokens, count)[:, None],
    }
    rows = sharding.put_whole_batch(mesh, on_host)
    shapes = {"w_gate": (width, hidden), "w_up": (width, hidden), "w_down": (hidden, width)}
    matrices = {}
    for name, of in shapes.items():
        placement = NamedSharding(mesh, sharding.PARAMETERS[name])
        matrices[name] = jax.device_put(normal(count, *of), placement)

    def layer(x, weights, matrices):
        return parallel.apply(run, mesh, x, routing.Routing(weights, rows["experts"]), matrices)[0]

    def pulled(*inputs):
        y, pull_back = jax.vjp(layer, *inputs)
        return y, pull_back(y)

    inputs = (rows["x"], rows["weights"], matrices)
    compiled = jax.jit(pulled if gradients else layer).lower(*inputs).compile()

    def step():
        return jax.block_until_ready(compiled(*inputs))

    return step, memory(compiled).temporaries


def measure(rows, shape, turns):
    """(rates, rows with figures) of (implementation, routing, E, gradients)."""
    subjects = limits.subjects()
    temporaries = {}
    for row in rows:
        implementation, kind, count, gradients = row
        step, temporaries[row] = build(implementation, kind, count, shape, gradients)
        subjects[row] = types.SimpleNamespace(run=timed(step))
    seconds = take_turns(subjects, turns, 3)
    best = limits.rates(seconds)
    found = []
    tokens, width, hidden = shape
    for row in rows:
        implementation, kind, count, gradients = row
        flops = 6 * tokens * K * width * hidden
        weights = 4 * 3 * count * width * hidden
        moved = weights + 4 * 2 * tokens * width
        if gradients:
            flops = 3 * flops
            moved = 2 * moved
        median = statistics.median(seconds[row])
        found.append(
            {
                "implementation": implementation,
                "routing": kind,
                "experts": count,
                "gradients": gradients,
                "seconds": median,
                "seconds_range": (min(seconds[row]), max(seconds[row])),
                "flops_per_s": flops / median,
                "share": limits.least_seconds(flops, moved, best) / median,
                "temporary_bytes": temporaries[row],
            }
        )
    for name in ("matmul", "copy"):
        subjects[name].close()
    return best, found


def show(best, rows, shape):
    table = Table(
        "experts",
        "rows an expert",
        "routing",
        "implementation",
        "",
        "ms",
        "min-max",
        "GFLOP/s",
        "share",
        "temp MB",
    )
    for row in rows:
        low, high = row["seconds_range"]
        table.add_row(
            str(row["experts"]),
            f"{shape[0] * K // row['experts']:,}",
            row["routing"],
            row["implementation"],
            "with gradients" if row["gradients"] else "forward",
            f"{1e3 * row['seconds']:.1f}",
            f"{1e3 * low:.1f}-{1e3 * high:.1f}",
            f"{row['flops_per_s'] / 1e9:.0f}",
            f"{row['share']:.0%}",
            f"{row['temporary_bytes'] / 1e6:.1f}",
        )
    console = Console(width=130)
    console.print(table)
    console.print(limits.describe(best))


def main():
    huge_pages.enable()  # as train.py has them
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experts", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--experts", default="8,64,256", help="how many, separated by commas")
    parser.add_argument(
        "--implementations", default=",".join(("auto", *EXPANDING)), help="of moe/experts.py"
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--expert_width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="turns of every row")
    parser.add_argument(
        "--json", type=pathlib.Path, help="also write rows, versions and device here"
    )
    flags = parser.parse_args()
    sharding.use_cpu_cores()
    counts = [int(count) for count in flags.experts.split(",")]
    shape = (flags.tokens, flags.width, flags.expert_width)
    on_tpu = jax.default_backend() == "tpu"
    rows = []
    implementations = flags.implementations.split(",")
    for row in itertools.product(implementations, ROUTINGS, counts, (False, True)):
        implementation, kind, count, _ = row
        is_cheap = kind == "balanced" and count == min(counts)
        if on_tpu or is_cheap or implementation not in EXPANDING:
            rows.append(row)
    best, found = measure(rows, shape, flags.rounds)
    show(best, found, shape)
    if flags.json:
        found = {
            "benchmark": "experts",
            "environment": environment(),
            "shape": shape,
            "limits": best,
            "rows": found,
        }
        flags.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
