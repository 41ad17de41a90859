"""The ERC loss of one layer with its gradients: time and memory of the paper's form and of ours.

    python -m benchmarks.erc [--sizes=3b,15b] [--json=FILE]

"naive" is the paper's pseudocode: one einsum "id,jdf->ijf" over all pairs, and its norm. "ours" is
`erc_loss`. All hinges are active at alpha 0, and none at a large alpha, where ours has no backward
pass through the experts. E, D and F are those of a size of `configs/sizes.py`. FLOPs are 2 E^2 D F
forward, and three times that with active hinges. Bytes are those of the gates and their gradients.
The share is the time that the machine's own matmul and copy would take, by the time measured; both
are measured in the same turns.
"""

import argparse
import functools
import itertools
import json
import pathlib
import statistics
import types

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks import environment, limits, take_turns, timed
from benchmarks.compiled.costs import memory
from configs import sizes
from moe_erc.launch import huge_pages
from moe_erc.losses.erc import coupling_penalty, erc_loss, perturb

HINGES = {"all active": 0.0, "none active": 100.0}  # at which alpha


def naive_erc(params, rng, alpha):
    """The form of the paper: an (E, E, F) array of all responses."""
    proxy_ED = perturb(params["router"], rng)
    responses_IJF = jnp.einsum("id,jdf->ijf", proxy_ED, params["w_gate"])
    return coupling_penalty(jnp.sqrt(jnp.sum(jnp.square(responses_IJF), axis=-1)), alpha)


def erc(params, rng, alpha):
    return erc_loss(params, rng, alpha=alpha)


FORMS = {"naive": naive_erc, "ours": erc}


def shape(size):
    """(E, D, F) of a named size."""
    fields = dict(zip(sizes.MODEL_FIELDS, sizes.MODELS[size], strict=True))
    return fields["experts"], fields["width"], fields["expert_width"]


@functools.cache
def parameters(size):
    """The parameters of one layer of a new model."""
    experts, width, hidden = shape(size)
    router, gate = jax.random.split(jax.random.key(0))
    draw = jax.jit(jax.random.normal, static_argnums=1)
    return {
        "router": draw(router, (experts, width)),
        "w_gate": 0.02 * draw(gate, (experts, width, hidden)),
    }


def build(form, size, alpha):
    """(step, temporary bytes)."""
    params = parameters(size)
    rng = jax.random.key(1)
    loss = functools.partial(FORMS[form], alpha=alpha)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, rng).compile()

    def step():
        jax.block_until_ready(compiled(params, rng))

    return step, memory(compiled).temporaries


def measure(names, turns):
    """(rates, rows with figures)."""
    rows = list(itertools.product(names, HINGES, FORMS))
    subjects = limits.subjects()
    temporaries = {}
    found = []
    for row in rows:
        size, hinges, form = row
        step, temporaries[row] = build(form, size, HINGES[hinges])
        subjects[row] = types.SimpleNamespace(run=timed(step))
    seconds = take_turns(subjects, turns, 3)
    best = limits.rates(seconds)
    for row in rows:
        size, hinges, form = row
        experts, width, hidden = shape(size)
        passes = 3 if HINGES[hinges] == 0 else 1
        flops = passes * 2 * experts**2 * width * hidden
        moved = 2 * 4 * experts * width * hidden
        median = statistics.median(seconds[row])
        # Turn by turn, so that a slow minute of the machine meets both.
        naive = seconds[size, hinges, "naive"]
        over_naive = [theirs / ours for theirs, ours in zip(naive, seconds[row], strict=True)]
        figures = {
            "size": size,
            "shape": (experts, width, hidden),
            "hinges": hinges,
            "form": form,
            "seconds": median,
            "seconds_range": (min(seconds[row]), max(seconds[row])),
            "over_naive": statistics.median(over_naive),
            "over_naive_range": (min(over_naive), max(over_naive)),
            "share": limits.least_seconds(flops, moved, best) / median,
            "temporary_bytes": temporaries[row],
        }
        found.append(figures)
    for name in ("matmul", "copy"):
        subjects[name].close()
    return best, found


def show(best, rows):
    table = Table("E, D, F", "hinges", "form", "ms", "min-max", "x as fast", "share", "temp MB")
    for row in rows:
        low, high = row["seconds_range"]
        least, most = row["over_naive_range"]
        table.add_row(
            ", ".join(map(str, row["shape"])),
            row["hinges"],
            row["form"],
            f"{1e3 * row['seconds']:,.0f}",
            f"{1e3 * low:,.0f}-{1e3 * high:,.0f}",
            f"{row['over_naive']:.2f} ({least:.2f}-{most:.2f})",
            f"{row['share']:.0%}",
            f"{row['temporary_bytes'] / 1e6:.0f}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(limits.describe(best))


def main():
    huge_pages.enable()  # as train.py has them
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.erc", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--sizes", default="3b,15b", help="of configs/sizes.py, separated by commas"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of every row")
    parser.add_argument(
        "--json", type=pathlib.Path, help="also write rows, versions and device here"
    )
    flags = parser.parse_args()
    best, rows = measure(flags.sizes.split(","), flags.rounds)
    show(best, rows)
    if flags.json:
        found = {"benchmark": "erc", "environment": environment(), "limits": best, "rows": rows}
        flags.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
