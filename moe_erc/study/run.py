"""Runs what is missing of a study: one `train.py` a run, several at a time, each on its own core.

A run is claimed, trained in a directory of its own, and becomes a row. A run that was killed goes
on where its checkpoint is. A run that has a row is never made again.
"""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from moe_erc.checks import BadInput, one_of
from moe_erc.data import text
from moe_erc.data.config import DataConfig
from moe_erc.measures import validation
from moe_erc.study import claims, rows
from moe_erc.study.arms import Plan, Run
from moe_erc.study.files import write_whole

POLL = 0.5  # seconds between two looks at the own runs
LOOK = 20.0  # seconds between two looks at the rows of others
REFUSED = 2  # the exit code of train.py for bad input, which no other run of the arm mends
OUTPUT = "output.txt"  # what a run prints
DIGEST = "config_digest"  # the file in the directory of a run that says of which config it is


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a study works."""

    runs: pathlib.Path  # its directory of runs
    script: pathlib.Path  # train.py


@dataclasses.dataclass
class Job:
    """A run that is being trained."""

    run: Run
    claim: claims.Claim
    process: subprocess.Popen
    core: int | None
    since: float


class Stop:
    """While entered, notes the first SIGTERM or SIGINT in place of ending."""

    def __init__(self):
        self.signal = None
        self._previous = {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        self.signal = self.signal or number


def check(plan: Plan, places: Places) -> None:
    """BadInput for what would stop the study later: rows, texts and directories of other runs."""
    found = rows.collect(plan, places.runs)
    finished = {(row["arm"], row["seed"]) for row in found}
    _say_if_not_committed(plan.path)
    corpora: dict[DataConfig, text.Corpus] = {}
    for run in plan.runs:
        if (run.arm, run.seed) in finished:
            continue
        data = DataConfig(**run.settings.config.data)
        # The text is tokenised here, once, and not by several runs at a time.
        if data not in corpora:
            corpora[data] = text.prepare(data)
        _check_outcome(plan, corpora[data])
        rows.check_corpus(found, run, corpora[data].identity)
        _check_directory(run, places.runs / run.name)


def _check_outcome(plan: Plan, corpus: text.Corpus) -> None:
    """Refuses the loss of a domain that the corpus has not, or a distance to an unknown floor."""
    family, _, name = plan.measure.key.partition("/")
    known = {
        validation.LOSS.key: corpus.streams["validation"],
        validation.FLOOR_DISTANCE.key: corpus.floors,
    }
    if family not in known:
        return
    if not known[family]:
        raise BadInput(
            f"study.outcome: {plan.measure.key!r}, but the entropy of data.sources is not known; "
            f"use the source 'planted', or '{validation.LOSS.of(validation.MEAN).key}'"
        )
    one_of("study.outcome: the domain", name, [validation.MEAN, *known[family]])


def _check_directory(run: Run, directory: pathlib.Path) -> None:
    path = directory / DIGEST
    if path.exists() and path.read_text(encoding="utf-8") != run.settings.digest:
        raise BadInput(
            f"'{directory}' is of another config of {run.arm!r}; delete it, "
            "or give the changed study a new name"
        )


def run_missing(plan: Plan, places: Places, jobs: int, stop: Stop) -> list[str]:
    """Runs what is missing and free, and returns the names of the runs that failed.

    Returns early, with the running ones stopped behind a checkpoint, once `stop` has a signal.

    Args:
      places: of the runs and of train.py.
      jobs: how many runs there are side by side; above 1, each has a core of its own.
    """
    commit = commit_of(places.script.parent)
    cores = _cores(jobs)
    progress = Progress(plan, jobs)
    running: list[Job] = []
    failed: list[str] = []
    unfinished = missing(plan, places.runs)
    looked = time.monotonic()
    while True:
        ended = [job for job in running if job.process.poll() is not None]
        for job in ended:
            running.remove(job)
            cores.append(job.core)
            made = _finish(plan, job, places, commit)
            _check_refusal(job, running, places)
            if not made and not stop.signal:
                failed.append(job.run.name)
        if stop.signal:
            _stop(running)
            return failed
        if ended or time.monotonic() - looked > LOOK:
            unfinished = missing(plan, places.runs)
            looked = time.monotonic()
        names = [*failed, *(job.run.name for job in running)]
        left = [run for run in unfinished if run.name not in names]
        while cores and (claimed := _claim_one(left, places.runs)):
            run, claim = claimed
            left.remove(run)
            running.append(_start(run, claim, places, cores.pop(0)))
        progress.show(len(unfinished), running)
        if not running and not _orphans(left, places.runs):
            _say_who_has(left, places.runs)
            return failed
        for job in running:
            job.claim.beat()
        time.sleep(POLL)


def missing(plan: Plan, directory: pathlib.Path) -> list[Run]:
    """The runs without a row."""
    found = {(row["arm"], row["seed"]) for row in rows.collect(plan, directory)}
    return [run for run in plan.runs if (run.arm, run.seed) not in found]


def commit_of(directory: pathlib.Path) -> str:
    """The commit of a git repository, with "+changes" where its files differ; else "unknown"."""
    try:
        commit = _git(directory, "rev-parse", "--short=10", "HEAD")
        changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+changes" if changes else commit


def _say_if_not_committed(path: pathlib.Path) -> None:
    """A study that may still be changed after its runs proves less."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if _git(path.parent, "status", "--porcelain", "--", path.name):
            _say(f"'{path}' is not committed; commit a study before its runs")


def _git(directory, *arguments):
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


def _cores(jobs: int) -> list[int | None]:
    """A core for each of several jobs; None lets a job take all devices, or any core."""
    if jobs == 1 or not hasattr(os, "sched_setaffinity"):
        return [None] * jobs
    available = sorted(os.sched_getaffinity(0))
    if jobs > len(available):
        raise BadInput(
            f"--jobs: {jobs} are more than the {len(available)} cores; use as many at most"
        )
    return available[:jobs]


def _claim_one(left: Sequence[Run], directory: pathlib.Path) -> tuple[Run, claims.Claim] | None:
    for run in left:
        claim = claims.take(directory / run.name)
        if claim is None:
            continue
        # Another process may have finished it between the look at the rows and the claim.
        if (directory / run.name / rows.ROW).exists():
            claim.release()
            continue
        return run, claim
    return None


def _check_refusal(job: Job, running: Sequence[Job], places: Places) -> None:
    """Ends the study on bad input that train.py alone could find; every run of the arm has it."""
    if job.process.returncode == REFUSED:
        _stop(running)
        raise BadInput(f"{job.run.name}: {_last_line(places.runs / job.run.name / OUTPUT)}")


def _say_who_has(left: Sequence[Run], directory: pathlib.Path) -> None:
    held = [run.name for run in left if claims.state(directory / run.name) == "held"]
    if held:
        _say(f"other processes have {', '.join(held)} and add their rows")


def _orphans(left: Sequence[Run], directory: pathlib.Path) -> bool:
    """Whether a `train.py` goes on here whose `study.py` was killed: its run is waited for."""
    return any(claims.state(directory / run.name) == "orphaned" for run in left)


def _start(run: Run, claim: claims.Claim, places: Places, core: int | None) -> Job:
    directory = places.runs / run.name
    _check_directory(run, directory)
    write_whole(directory / DIGEST, run.settings.digest)
    command = [sys.executable, str(places.script), *run.settings.arguments]
    command += [f"--config.seed={run.seed}", f"--workdir={directory}"]
    environment = dict(os.environ)
    if core is not None:
        environment["JAX_NUM_CPU_DEVICES"] = "1"
    with open(directory / OUTPUT, "ab") as output, _on(core):
        # In a session of its own, Ctrl-C reaches this process alone, which then stops its runs.
        # It inherits the claim, which outlives this process in it.
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
            pass_fds=[claim.descriptor],
        )
    _say(f"{run.name} starts")
    return Job(run, claim, process, core, time.monotonic())


@contextlib.contextmanager
def _on(core: int | None) -> Iterator[None]:
    """A process that is started in here has that core alone."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _finish(plan: Plan, job: Job, places: Places, commit: str) -> bool:
    """Makes the row of a run that has ended, and gives the run back; whether there is a row."""
    directory = places.runs / job.run.name
    code = job.process.returncode
    reason = f"exit code {code}"
    made = False
    if code == 0:
        try:
            rows.keep_row(directory, rows.make_row(plan, job.run, directory, commit))
            rows.collect(plan, places.runs)
            made = True
        except rows.NoOutcome as error:
            reason = str(error)
    job.claim.release()
    if made:
        _say(f"{job.run.name} is done")
    else:
        _say(f"{job.run.name} has no row ({reason}): {_last_line(directory / OUTPUT)}")
    return made


def _last_line(path: pathlib.Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    spoken = [line.strip() for line in lines if line.strip()]
    return spoken[-1].removeprefix("error: ") if spoken else f"'{path}' is empty"


def _stop(running: Sequence[Job]) -> None:
    """Ends the runs as a user would: each saves a checkpoint."""
    for job in running:
        with contextlib.suppress(ProcessLookupError):
            job.process.send_signal(signal.SIGTERM)
    for job in running:
        job.process.wait()
        job.claim.release()
        _say(f"{job.run.name} is stopped; it goes on where its checkpoint is")


def _say(line: str) -> None:
    print(line, flush=True)


class Progress:
    """Says how many runs are done and left, and how long they will take, whenever that changes."""

    def __init__(self, plan: Plan, jobs: int):
        self._plan = plan
        self._jobs = jobs
        self._began = time.monotonic()
        self._first_left: int | None = None
        self._said = None

    def show(self, left: int, running: Sequence[Job]) -> None:
        """left: runs without a row, those that are running among them."""
        if self._first_left is None:
            self._first_left = left
        state = (left, len(running))
        if state == self._said:
            return
        self._said = state
        total = len(self._plan.runs)
        line = f"{self._plan.name}: {total - left} of {total} runs are done"
        if left:
            line += f", {len(running)} running, {left - len(running)} to come"
            line += f", {self._expected(left)}"
        _say(line)

    def _expected(self, left: int) -> str:
        done = self._first_left - left
        if not done:
            return "the time left is known after the first run"
        seconds = (time.monotonic() - self._began) / done * left
        return f"about {tqdm.format_interval(seconds)} left"
