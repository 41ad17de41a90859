"""Claims: of several processes that share a directory, on one machine or many, one has a run.

A claim on a run is the file `RUN.claim-N`. The highest N is in force. Taking a run over is creating
N + 1, which the file system allows to one process alone. A claim is stale, and may be taken over,

    on the machine that made it     when its lock is free
    on any other machine            when it was not touched for `STALE` seconds

`study.py` locks it, and `train.py` inherits the lock when it is started. The system frees the lock
when both have ended, however they end.

The holder touches the claim every `BEAT` seconds. Its age is measured against a file that was made
just now in the same directory, so the clocks of the machines do not matter.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import secrets
import socket
import time
from typing import BinaryIO, Literal, NamedTuple

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
    """A run that this process has, until it is released or this object is gone."""

    def __init__(self, path: pathlib.Path, file: BinaryIO):
        self.path = path
        self._file = file
        self._beaten = time.monotonic()

    @property
    def descriptor(self) -> int:
        """The open file that holds the lock; a process that inherits it holds the claim as well."""
        return self._file.fileno()

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
        self._file.close()


def take(prefix: pathlib.Path) -> Claim | None:
    """A claim on the run whose claims are called `prefix`.claim-N; None if it is not free."""
    newest = _newest(prefix)
    if newest is not None and state(prefix) != "free":
        return None
    number = 0 if newest is None else _split(newest)[1] + 1
    path = _numbered(prefix, number)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    # The claim gets its name when it is whole and locked, so nobody sees a part of it.
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    content = json.dumps({"machine": machine(), "study": process(os.getpid())})
    # Without `with`: an open file is the lock.
    file = open(draft, "wb")  # noqa: SIM115
    try:
        _lock(file)
        file.write(content.encode())
        file.flush()
        os.link(draft, path)
    except FileExistsError:  # another process was faster
        file.close()
        return None
    finally:
        draft.unlink()
    return Claim(path, file)


def state(prefix: pathlib.Path) -> State:
    """Whether a run may be claimed.

    "orphaned": its training goes on, on this machine, and nobody waits for it.
    """
    path = _newest(prefix)
    if path is None:
        return "free"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:  # released just now
        return "held"
    if content["machine"] != machine():
        return "held" if _age(path) < STALE else "free"
    if not _is_locked(path):
        return "free"
    return "held" if _is_alive(content["study"]) else "orphaned"


def _lock(file: BinaryIO) -> None:
    """Locks a file that nobody else has open, where the file system has locks."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_locked(path: pathlib.Path) -> bool:
    """Whether a process of this machine has the claim."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:  # released just now
        return False
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return _age(path) < STALE
    return False


def _is_alive(known) -> bool:
    return process(known[0]) == Process(*known)


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
