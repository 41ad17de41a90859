"""Scripts that measure, each printing a table and writing JSON; nothing here is asserted in tests.

What is compared is a subject, in a process of its own that sleeps while another is measured: thread
pools of two frameworks never share the cores, and each compiles once. Turns alternate, so a slow
minute of the machine meets all.
"""

import importlib
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import time

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")


class Subject:
    """`build` is "module:function"; in the new process, called with `options`, it returns (run, facts).

    run(steps) -> seconds of each step, waited for to its end; facts: what else is to be said, in
    plain values, which a run may renew.
    """

    def __init__(self, build, **options):
        context = multiprocessing.get_context(
            "spawn"
        )  # a fork would inherit the threads of whatever runs here
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, options), daemon=True)
        self._process.start()
        theirs.close()  # a subject that dies is then an EOFError here, not a wait without end
        self.facts = self._connection.recv()

    def run(self, steps):
        """Seconds of each of so many steps; `facts` are then those after the last."""
        self._connection.send(steps)
        seconds, self.facts = self._connection.recv()
        return seconds

    def close(self):
        """Ends the process."""
        self._connection.send(0)
        self._process.join()


def _serve(connection, build, options):
    module, function = build.split(":")
    run, facts = getattr(importlib.import_module(module), function)(**options)
    connection.send(facts)
    while steps := connection.recv():
        seconds = run(steps)
        connection.send((seconds, facts))


def timed(step):
    """The `run` of a subject from `step()`, which returns once its work is done."""

    def run(steps):
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        return seconds

    return run


def take_turns(subjects, rounds, steps):
    """{name: [median seconds of a step in round 1, …]}: every subject once a round, the order turned each time.

    The first step of a turn is not counted: it wakes threads and refills caches that the others
    have used.
    """
    seconds = {name: [] for name in subjects}
    for turn in range(rounds):
        order = list(subjects)
        for name in order if turn % 2 == 0 else reversed(order):
            seconds[name].append(statistics.median(subjects[name].run(steps + 1)[1:]))
    return seconds


def environment():
    """Versions, processor and cores, for the JSON beside every table."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {
        "python": platform.python_version(),
        "packages": found,
        "processor": processor(),
        "cores": cores(),
    }


def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor():
    """The CPU's own name, where Linux tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(
                line.split(":")[1].strip() for line in lines if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
