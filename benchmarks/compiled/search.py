"""The cuts of a training step over a slice, compiled one after another and ranked by the clock.

A cut is a mesh, whether layers are recomputed, and a number of micro-batches. Every cut is compiled
in a process of its own, because some programs abort the compiler. Results are kept as JSON lines,
and a search that was killed goes on where it stopped.
"""

import hashlib
import json
import math
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from benchmarks import environment
from benchmarks.compiled import clock, report
from moe_erc.checks import BadInput
from moe_erc.model.config import ModelConfig

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = ("moe_erc/**/*.py", "benchmarks/compile_ahead.py", "benchmarks/compiled/*.py")
FITS = "fits"
TOO_LARGE = "does not fit"
FAILS = "fails"
CHECK = "Check failed"  # how a program says that it aborts
REFUSAL = "error: does not fit: "


class Cut(NamedTuple):
    """What a search varies."""

    data: int
    expert: int
    remat: str
    micro_batches: int

    def __str__(self):
        plural = "" if self.micro_batches == 1 else "es"
        recomputed = "recomputed" if self.remat == "block" else "kept"
        return (
            f"{self.data} x {self.expert}, {self.micro_batches} micro-batch{plural}, "
            f"layers {recomputed}"
        )

    def overrides(self) -> list[str]:
        return [
            f"--config.mesh.data={self.data}",
            f"--config.mesh.expert={self.expert}",
            f"--config.model.remat={self.remat}",
            f"--config.train.micro_batches={self.micro_batches}",
        ]


def meshes(model: ModelConfig, devices: int) -> list[tuple[int, int]]:
    """The sensible (data, expert) of a number of devices.

    The expert axis is a power of two, at most K: on a longer one most devices gather tokens that
    none of their experts is given.
    """
    found = []
    expert = 1
    while expert <= model.experts_per_token:
        data = devices // expert
        is_divided = devices % expert == 0 and model.experts % expert == 0
        if is_divided and math.gcd(model.width, model.kv_width, model.expert_width) % data == 0:
            found.append((data, expert))
        expert *= 2
    return found


def micro_batches(batch_size: int, devices: int) -> list[int]:
    """The numbers of micro-batches that leave every device whole sequences, the fewest first."""
    sequences = batch_size // devices
    return [number for number in range(1, sequences + 1) if sequences % number == 0]


def each(
    mesh_shapes: Sequence[tuple[int, int]], numbers: Sequence[int], measure: Callable[[Cut], dict]
) -> Iterator[dict]:
    """What `measure` finds of every sensible cut.

    Every micro-batch gathers the weights again, so of one mesh there is no more of them than memory
    asks for. Layers that are not recomputed need more memory, so nothing smaller is tried.
    """
    for data, expert in mesh_shapes:
        left = list(numbers)
        for remat in ("block", "none"):
            found = {}
            while left:
                found = measure(Cut(data, expert, remat, left[0]))
                yield found
                if found["outcome"] != TOO_LARGE:
                    break
                left = left[1:]


def rank(results: Sequence[dict]) -> list[dict]:
    """Those that fit, the fastest first; then those that do not; then those that failed."""

    def place(found):
        seconds = found["estimate"]["step"]["likely"] if found["outcome"] == FITS else 0
        return (FITS, TOO_LARGE, FAILS).index(found["outcome"]), seconds

    return sorted(results, key=place)


class Kept:
    """The results of one search in a file of JSON lines, which several searches may share."""

    def __init__(self, path: pathlib.Path, key: str):
        self.path = path
        self.key = key
        self.found = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the search was killed while it wrote this line
            if record["key"] == key:
                self.found[Cut(**record["cut"])] = record

    def or_measured(self, cut: Cut, measure: Callable[[Cut], dict]) -> dict:
        """The result of a cut, which is measured and written if it is not kept."""
        if cut not in self.found:
            record = {"key": self.key, "cut": cut._asdict(), **measure(cut)}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # The line begins with its newline: the one before it may be torn.
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(record) + "\n")
            self.found[cut] = record
        return self.found[cut]


def key(config: ConfigDict, asked: Sequence[object]) -> str:
    """A name of all that a result depends on beside its cut.

    asked: what else was asked for, such as the topology. Versions and sources are a part of it.
    """
    values = json.loads(config.to_json_best_effort())
    values["mesh"] = None
    values["model"]["remat"] = None
    values["train"]["micro_batches"] = None
    sources = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            sources.update(path.read_bytes())
    everything = [values, list(asked), environment()["packages"], sources.hexdigest()]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


def compile_apart(arguments: Sequence[str]) -> dict:
    """What `benchmarks.compile_ahead` finds of a step, in a process of its own.

    {"outcome"}, and of a step that fits {"estimate", "allocated", "sent", "seconds"}, of another
    one {"why"}.
    """
    with tempfile.TemporaryDirectory() as directory:
        written = pathlib.Path(directory) / "found.json"
        command = [sys.executable, "-m", "benchmarks.compile_ahead", *arguments]
        command += ["--nosearch", "--noparameter_losses", f"--json={written}"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode == 0:
            return _summary(json.loads(written.read_text(encoding="utf-8")))
    lines = ended.stderr.strip().splitlines()
    last = lines[-1] if lines else f"exit code {ended.returncode}"
    if last.startswith(REFUSAL):
        return {"outcome": TOO_LARGE, "why": last.removeprefix(REFUSAL)}
    # Of a program that aborts the compiler the last lines are addresses.
    checks = [line[line.index(CHECK) :] for line in lines if CHECK in line]
    return {"outcome": FAILS, "why": checks[0] if checks else last}


def _summary(found):
    step = found["programs"]["step"]
    names = ("estimate", "allocated", "sent", "seconds")
    return {"outcome": FITS} | {name: step[name] for name in names}


def run(config: ConfigDict, devices: int, asked: Sequence[object], path: pathlib.Path) -> None:
    """Search, and print results as they come and ranked at the end.

    asked: the topology and whatever else decides about results.
    """
    model = ModelConfig.of(config)
    shapes = meshes(model, devices)
    numbers = micro_batches(config.train.batch_size, devices)
    if not shapes or not numbers:
        raise BadInput(
            f"--search: no mesh of {devices} devices splits a batch of {config.train.batch_size}, "
            f"{model.experts} experts and widths {model.width}, {model.kv_width} and "
            f"{model.expert_width}; use another --topology"
        )
    kept = Kept(path, key(config, asked))
    # SIGTERM, too, then ends the process that compiles.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    print(f"results are kept in {path}", flush=True)

    def measure(cut):
        return compile_apart([*sys.argv[1:], *cut.overrides()])

    results = []
    for found in each(shapes, numbers, lambda cut: kept.or_measured(cut, measure)):
        results.append(found)
        print(f"{Cut(**found['cut'])}: {describe(found)}", flush=True)
    Console(width=150).print(table(rank(results)))


def describe(found: dict) -> str:
    """A result in one line."""
    if found["outcome"] != FITS:
        return f"{found['outcome']}: {found['why']}"
    return (
        f"{report.seconds(clock.Seconds(**found['estimate']['step']))}, "
        f"{report.gib(found['allocated'])} GiB allocated, {found['sent'] / 1e9:.3g} GB sent; "
        f"compiled in {found['seconds']:.0f} s"
    )


def table(ranked: Sequence[dict]) -> Table:
    """A row for every result."""
    found = report.numbers(
        "cut",
        "estimate, s",
        "best to worst case",
        "GiB allocated",
        "GB sent",
        "otherwise",
        title="Estimates serve to compare programs; they are no speeds",
        text=(0, 5),
    )
    for result in ranked:
        cells = ["", "", "", "", f"{result['outcome']}: {result.get('why', '')}"]
        if result["outcome"] == FITS:
            step = result["estimate"]["step"]
            cells = [
                f"{step['likely']:.3g}",
                f"{step['best']:.3g} to {step['worst']:.3g}",
                report.gib(result["allocated"]),
                f"{result['sent'] / 1e9:.3g}",
                "",
            ]
        found.add_row(str(Cut(**result["cut"])), *cells)
    return found
