"""The metrics of a run as a file of JSON lines, one line per write:

    {"step": 7, "loss/lm": 1.5, "router/load": [0.2, 0.8]}

A line is handed to the operating system at once, so a killed run loses nothing that it wrote. A
bucket cannot append; there `flush` writes the whole file. A resumed run first drops the lines at or
beyond the step that it starts from, so the file reads as if the run had never stopped.
"""

import json
import math
from collections.abc import Mapping

from etils import epath


class LocalJsonLines:
    """Lines that are appended to a file of a local disk."""

    def __init__(self, path, first_step):
        truncate(path, first_step)
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def holds(self, step: int, name: str) -> bool:
        """Whether a line of that step has that metric."""
        return _holds(self._path.read_text(encoding="utf-8"), step, name)

    def write(self, step: int, values: Mapping) -> None:
        """Appends a line."""
        self._file.write(_line(step, values))
        self._file.flush()

    def flush(self) -> None:
        """Nothing: every write flushes."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class RemoteJsonLines:
    """Lines that are kept in memory until the file is written to a bucket."""

    def __init__(self, path, first_step):
        self._path = path
        self._text = _before(path, first_step) if path.exists() else ""

    def holds(self, step: int, name: str) -> bool:
        """Whether a line of that step has that metric."""
        return _holds(self._text, step, name)

    def write(self, step: int, values: Mapping) -> None:
        """Adds a line in memory."""
        self._text += _line(step, values)

    def flush(self) -> None:
        """Writes the whole file."""
        self._path.write_text(self._text, encoding="utf-8")

    def close(self) -> None:
        """Writes the whole file."""
        self.flush()


def truncate(path: epath.PathLike, first_step: int) -> None:
    """Keeps the lines of `path` before `first_step`, in one atomic replacement.

    A torn last line goes as well.
    """
    path = epath.Path(path)
    if path.exists():
        shorter = path.with_suffix(".tmp")
        shorter.write_text(_before(path, first_step), encoding="utf-8")
        shorter.replace(path)


def _before(path, first_step):
    lines = path.read_bytes().decode(errors="replace").splitlines(keepends=True)
    return "".join(line for line in lines if _is_before(line, first_step))


def _is_before(line, first_step):
    if not line.endswith("\n"):
        return False
    try:
        return json.loads(line)["step"] < first_step
    # It is no line that was written here.
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _holds(text, step, name):
    for line in text.splitlines():
        values = json.loads(line)
        if values["step"] == step and name in values:
            return True
    return False


def _line(step, values):
    return json.dumps({"step": step} | _without_nan(values)) + "\n"


def _without_nan(value):
    """The value with None, JSON's null, in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return value if math.isfinite(value) else None
