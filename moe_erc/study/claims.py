"""Claims: of several processes that share a directory, on one machine or many, one has a run.

A claim on a run is the file `RUN.claim-N`. The highest N is in force. Taking a run over is creating
N + 1, which the file system allows to one process alone. A claim is stale, and may be taken over,

    on the machine that made it     when neither its `study.py` nor its `train.py` is alive
    on any other machine            when it was not touched for `STALE` seconds

Its holder touches it every `BEAT` seconds. Its age is measured against a file that was made just
now in the same directory, so the clocks of the machines do not matter.
"""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import time
from typing import Literal, NamedTuple

from moe_erc.study.files import write_whole

STALE = 600.0
BEAT = 20.0

State = Literal["free", "held", "orphaned"]


class Process(NamedTuple):
    """A process, so that another one with its number is not taken for it."""

    pid: int
    started: str


def machine() -> str:
    """The name of this machine; another one after a restart, and in another container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
        parts.append(boot.read_text(encoding="utf-8").strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def process(pid: int) -> Process | None:
    """The process of that number if it is alive; one that only waits to be buried is not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:  # no Linux, or it ended just now
        return Process(pid, "")
    # The name of the program, in parentheses, may hold spaces.
    fields = text.rpartition(")")[2].split()
    is_zombie = fields[0] == "Z"
    return None if is_zombie else Process(pid, fields[19])


class Claim:
    """A run that this process has, until it is released."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._beaten = time.monotonic()
        self._content = {"machine": machine(), "study": process(os.getpid()), "train": None}

    def name_training(self, pid: int) -> None:
        """Says which process trains: it may outlive this one."""
        self._content["train"] = process(pid)
        self.write()

    def write(self) -> None:
        """Writes what the claim says of its holder."""
        write_whole(self.path, json.dumps(self._content))

    def beat(self) -> None:
        """Shows other machines that the holder is alive."""
        if time.monotonic() - self._beaten > BEAT:
            self._beaten = time.monotonic()
            os.utime(self.path)

    def release(self) -> None:
        """Gives the run back. Older claims, of the dead, go as well."""
        prefix, number = _split(self.path)
        for older in range(number + 1):
            path = _numbered(prefix, older)
            path.unlink(missing_ok=True)


def take(prefix: pathlib.Path) -> Claim | None:
    """A claim on the run whose claims are called `prefix`.claim-N; None if it is not free."""
    newest = _newest(prefix)
    if newest is not None and state(prefix) != "free":
        return None
    number = 0 if newest is None else _split(newest)[1] + 1
    path = _numbered(prefix, number)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:  # another process was faster
        return None
    claim = Claim(path)
    claim.write()
    return claim


def state(prefix: pathlib.Path) -> State:
    """Whether a run may be claimed.

    "orphaned": its training goes on, on this machine, and nobody waits for it.
    """
    path = _newest(prefix)
    if path is None:
        return "free"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # released just now, or not written yet
        return "held" if _age(path) < STALE else "free"
    if content["machine"] != machine():
        return "held" if _age(path) < STALE else "free"
    if _is_alive(content["study"]):
        return "held"
    return "orphaned" if _is_alive(content["train"]) else "free"


def _is_alive(known) -> bool:
    return known is not None and process(known[0]) == Process(*known)


def _age(path) -> float:
    """Seconds since it was touched, by the clock of the file system; 0 for one that is gone."""
    probe = path.with_name(f".now-{secrets.token_hex(4)}")
    try:
        probe.touch()
        age = probe.stat().st_mtime - path.stat().st_mtime
        probe.unlink()
    except FileNotFoundError:
        return 0.0
    return age


def _newest(prefix) -> pathlib.Path | None:
    found = list(prefix.parent.glob(f"{prefix.name}.claim-*"))
    return max(found, key=lambda path: _split(path)[1], default=None)


def _split(path) -> tuple[pathlib.Path, int]:
    name, _, number = path.name.rpartition(".claim-")
    return path.with_name(name), int(number)


def _numbered(prefix, number) -> pathlib.Path:
    return prefix.with_name(f"{prefix.name}.claim-{number}")
