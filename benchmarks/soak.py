"""A long run at size debug with evaluations, saves and restarts: does anything grow or slow down?

    python -m benchmarks.soak --steps=5000 --restarts=2

It takes some minutes, and needs an idle machine for its speeds. It also checks that no line of
metrics is missing. Memory and open files are read from /proc every second. Growth is that after the
warm-up, the first fifth of the steps of a start. Speeds are medians over the second and over the
last fifth of the steps of the longest start.
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
    """[(step, resident bytes, open files)] from a start to a step, or to the end of the run.

    At the step the run gets a SIGTERM.
    """
    before = len(run.speeds())
    samples = []
    step = 0
    run.start()
    while run.running() and step < until_step:
        time.sleep(1)
        speeds = run.speeds()
        # The first line is written after everything was compiled.
        if len(speeds) > before and run.running():
            step = speeds[-1][0]
            try:
                samples.append((step, *run.resources()))
            except OSError:  # the process has just ended
                break
    if step >= until_step:
        run.send(signal.SIGTERM)
    else:
        run.finish()
    return samples


def growth(samples):
    """(MB after the warm-up, MB at the end, open files after the warm-up, open files at the end).

    Each is a median over five seconds.
    """
    first = samples[0][0]
    last = samples[-1][0]
    warm = [sample for sample in samples if sample[0] >= first + WARM_UP * (last - first)]
    bytes_at_start, files_at_start = medians(warm[:5])
    bytes_at_end, files_at_end = medians(warm[-5:])
    return bytes_at_start / 1e6, bytes_at_end / 1e6, int(files_at_start), int(files_at_end)


def medians(samples):
    """(resident bytes, open files), the median of each."""
    _, resident, files = zip(*samples, strict=True)
    return statistics.median(resident), statistics.median(files)


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

    def median_speed(part):
        """Over a fifth of the steps, counted from 0."""
        rates = []
        for step, rate in run.speeds():
            if part < (step - begin) / fifth <= part + 1:
                rates.append(rate)
        return statistics.median(rates)

    start = median_speed(1)
    end = median_speed(4)
    console.print(
        f"speed: {start:,.0f} tokens/s at the start, {end:,.0f} at the end, {end / start - 1:+.1%}"
    )


if __name__ == "__main__":
    main()
