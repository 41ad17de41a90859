"""Scripts that measure; each prints a table and writes JSON. Tests assert none of their results.

Each of the things that are compared is a subject. It has a process of its own, which sleeps while
another subject is measured. Thread pools of two frameworks therefore never share the cores, and
each subject compiles once. Subjects take turns, so that a slow minute of the machine meets all.
"""

import contextlib
import importlib
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import time

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "numpy", "torch", "transformers")


class Subject:
    """Something to measure, in a process of its own.

    `build` is "module:function". The process calls it with `options`, and it returns (run, facts).
    run(steps) returns the seconds of each step, up to the end of its work. `facts` are other plain
    values, which a run may change.
    """

    def __init__(self, build, **options):
        # A fork would inherit the threads of this process.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, options), daemon=True)
        self._process.start()
        theirs.close()  # so that a subject that dies is an EOFError here, and not an endless wait
        self.facts = self._connection.recv()

    def run(self, steps):
        """Seconds of each of `steps` steps; `facts` are then those after the last step."""
        self._connection.send(steps)
        seconds, self.facts = self._connection.recv()
        return seconds

    def close(self):
        """End the process."""
        self._connection.send(0)
        self._process.join()


def _serve(connection, build, options):
    module, function = build.split(":")
    run, facts = getattr(importlib.import_module(module), function)(**options)
    connection.send(facts)
    steps = connection.recv()
    while steps:  # 0 is the end
        seconds = run(steps)
        connection.send((seconds, facts))
        steps = connection.recv()


def timed(step):
    """The `run` of a subject, made of `step()`, which must return at the end of its work."""

    def run(steps):
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        return seconds

    return run


def take_turns(subjects, rounds, steps):
    """{name: [median seconds of a step in round 1, in round 2, …]}.

    Every subject has one turn in a round, and the order is reversed from round to round. The first
    step of a turn is not counted, because it wakes threads and refills caches.
    """
    seconds = {name: [] for name in subjects}
    for turn in range(rounds):
        order = list(subjects)
        if turn % 2 == 1:
            order.reverse()
        for name in order:
            counted = subjects[name].run(steps + 1)[1:]
            seconds[name].append(statistics.median(counted))
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
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor():
    """The name of the CPU, as Linux gives it, or its kind."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
