"""Kills a run again and again, at random moments, and compares what it ends with to the run that nobody killed.

    python -m benchmarks.kills --kills=20                       about half a minute for each on two cores

The moments are in turn: while the corpus is prepared, before the first step, in a step, while a checkpoint is written,
in an evaluation, and right after a line of metrics. Parameters, moments and metrics must be the same bit for bit.
"""

import argparse
import collections
import pathlib
import random
import shutil
import signal
import tempfile
import time

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.watched import Watched
from configs import erc
from moe_erc.training.build import build
from moe_erc.training.checkpoint import Checkpoints

STEPS_A_KILL, EVALUATE, SAVE = 40, 20, 5


def in_corpus(run, chance):
    """Once the first directory of the cache is there, which `kill` has removed before."""
    yield from until(lambda: run.cache.exists() and any(run.cache.iterdir()))
    time.sleep(chance.uniform(0, 0.5))


def before_the_first_step(run, chance):
    """At any time of the imports, the restoring and the compilation."""
    end = time.monotonic() + chance.uniform(0, 15)
    yield from until(lambda: time.monotonic() > end)


def in_a_step(run, chance):
    """Within a few thousandths of a second after the metrics of an earlier one."""
    yield from until(lines_more(run, chance.randrange(1, STEPS_A_KILL // 2)))
    time.sleep(chance.uniform(0, 0.02))


def in_a_save(run, chance):
    """While a checkpoint is under its temporary name."""
    yield from until(lines_more(run, chance.randrange(1, STEPS_A_KILL // 2)))
    yield from until(lambda: any((run.workdir / "checkpoints").glob("*tmp*")))
    time.sleep(chance.uniform(0, 0.05))


def in_an_evaluation(run, chance):
    """Between the metrics of a step and those of the evaluation behind it."""
    yield from until(lines_more(run, 1))
    yield from until(lambda: (last := run.metrics()[-1])["step"] % EVALUATE == 0 and "loss/lm" in last)
    time.sleep(chance.uniform(0, 0.1))


def at_metrics(run, chance):
    """As soon as the file of metrics has grown."""
    yield from until(lines_more(run, chance.randrange(1, STEPS_A_KILL // 2)))
    size = len(run.text())
    yield from until(lambda: len(run.text()) > size)


MOMENTS = (in_corpus, before_the_first_step, in_a_step, in_a_save, in_an_evaluation, at_metrics)


def until(condition):
    """Yields until it holds."""
    while not condition():
        time.sleep(0.0005)
        yield


def lines_more(run, count):
    """() -> whether so many lines of metrics have been added since the run was started."""
    before = run.metrics()
    first = before[-1]["step"] if before else 0
    fresh = time.time()
    path = run.workdir / "metrics.jsonl"

    def added():
        if not path.exists() or path.stat().st_mtime < fresh:  # still the killed run's
            return False
        lines = run.metrics()
        return bool(lines) and lines[-1]["step"] >= max(first - SAVE, 0) + count

    return added


def kill(run, moment, chance):
    """Starts the run and kills it at a moment; whether it was still running then."""
    if moment is in_corpus:
        shutil.rmtree(run.cache, ignore_errors=True)
    waiting = moment(run, chance)
    run.start()
    for _ in waiting:
        if not run.running():
            return False
    return run.send(signal.SIGKILL) == -signal.SIGKILL


def final_state(workdir, steps):
    """Everything in the last checkpoint, on the host."""
    config = erc.get_config("debug")
    config.train.steps = steps
    config.mesh.expert = 1
    shapes = build(config).abstract_state
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        if checkpoints.newest_intact() != steps:
            raise SystemExit(f"{workdir}: the last checkpoint is of step {checkpoints.latest_step()}, not of {steps}")
        state, _ = checkpoints.restore(shapes)
    return jax.device_get(state.replace(rng=jax.random.key_data(state.rng)))


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--directory", type=pathlib.Path, help="a new one; a temporary one if not given")
    flags = parser.parse_args()
    directory = flags.directory or pathlib.Path(tempfile.mkdtemp())
    directory.mkdir(parents=True, exist_ok=True)
    steps, chance = STEPS_A_KILL * (flags.kills + 1), random.Random(flags.seed)
    settings = {"train.steps": steps, "eval.every": EVALUATE, "checkpoint.every": SAVE, "log.every": 1}
    undisturbed, killed = (Watched(directory, directory / name, **settings) for name in ("undisturbed", "killed"))
    undisturbed.start()
    undisturbed.finish()

    kills = collections.Counter()
    for number in range(flags.kills):
        moment = MOMENTS[number % len(MOMENTS)]
        kills[moment] += kill(killed, moment, chance)
    killed.start()
    killed.finish()

    jax.tree.map(np.testing.assert_array_equal, *(final_state(run.workdir, steps) for run in (undisturbed, killed)))
    if killed.metrics() != undisturbed.metrics():
        raise SystemExit(f"the metrics of {killed.workdir} and {undisturbed.workdir} differ")
    table = Table("moment", "kills", title=f"{kills.total()} kills in {steps} steps: the same bits, the same metrics")
    for moment in MOMENTS:
        table.add_row(moment.__name__.replace("_", " "), str(kills[moment]))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
