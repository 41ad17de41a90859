"""A long run at size debug with evaluations, saves and restarts: does anything grow, get lost or slow down?

    python -m benchmarks.soak --steps=5000 --restarts=2        some minutes; its speeds are those of an idle machine

Memory and open files are read from /proc every second; growth is from the end of the warm-up, a
fifth of a start's steps, to its end. Speeds are medians over the second and the last fifth of the
steps of the longest start.
"""

import argparse
import pathlib
import signal
import statistics
import tempfile
import time

from rich.console import Console
from rich.table import Table

from benchmarks.watched import Watched

LOG = 10
EVALUATE = 250
SAVE = 100
WARM_UP = 0.2  # of the steps of a start


def watch(run, until_step):
    """[(step, resident bytes, open files)] from a start to a step, where it gets SIGTERM, or to its end."""
    before = len(run.speeds())
    samples = []
    step = 0
    run.start()
    while run.running() and step < until_step:
        time.sleep(1)
        speeds = run.speeds()
        if (
            len(speeds) > before and run.running()
        ):  # the first line comes after everything was compiled
            step = speeds[-1][0]
            try:
                samples.append((step, *run.resources()))
            except OSError:  # it has just ended
                break
    if step >= until_step:
        run.send(signal.SIGTERM)
    else:
        run.finish()
    return samples


def growth(samples):
    """(MB after the warm-up, MB at the end, open files then and then) as medians of five seconds each."""
    first = samples[0][0]
    last = samples[-1][0]
    warm = [sample for sample in samples if sample[0] >= first + WARM_UP * (last - first)]
    start, end = (
        [statistics.median(column) for column in zip(*part, strict=True)]
        for part in (warm[:5], warm[-5:])
    )
    return start[1] / 1e6, end[1] / 1e6, int(start[2]), int(end[2])


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--restarts", type=int, default=2)
    parser.add_argument(
        "--directory", type=pathlib.Path, help="a new one; a temporary one if not given"
    )
    flags = parser.parse_args()
    directory = flags.directory or pathlib.Path(tempfile.mkdtemp())
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "train.steps": flags.steps,
        "log.every": LOG,
        "eval.every": EVALUATE,
        "checkpoint.every": SAVE,
    }
    run = Watched(directory, directory / "run", **settings)

    table = Table(
        "steps",
        "MB after warm-up",
        "MB at the end",
        "growth",
        "open files",
        title="memory of the process",
    )
    ends = [flags.steps * (number + 1) // (2 * flags.restarts) for number in range(flags.restarts)]
    for end in [*ends, flags.steps + 1]:
        samples = watch(run, end)
        warm, last, files, files_at_end = growth(samples)
        steps = f"{samples[0][0]:,}-{samples[-1][0]:,}"
        table.add_row(
            steps,
            f"{warm:.1f}",
            f"{last:.1f}",
            f"{last / warm - 1:+.2%}",
            f"{files} -> {files_at_end}",
        )
    console = Console(width=120)
    console.print(table)

    steps = [line["step"] for line in run.metrics() if "loss/lm" in line]
    missing = sorted(set(range(LOG, flags.steps + 1, LOG)) - set(steps))
    twice = sorted({step for step in steps if steps.count(step) > 1})
    console.print(
        f"metrics: {len(steps)} lines, missing {missing or 'none'}, twice {twice or 'none'}"
    )

    begin = ends[-1] if ends else 0
    fifth = (flags.steps - begin) / 5
    rates = [
        [rate for step, rate in run.speeds() if low < (step - begin) / fifth <= low + 1]
        for low in (1, 4)
    ]
    start, end = map(statistics.median, rates)
    console.print(
        f"speed: {start:,.0f} tokens/s at the start, {end:,.0f} at the end, {end / start - 1:+.1%}"
    )


if __name__ == "__main__":
    main()
