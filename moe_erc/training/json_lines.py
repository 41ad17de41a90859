"""The metrics of a run as a file of JSON lines: {"step": 7, "loss/lm": 1.5, "router/load": [0.2, 0.8]} for one write.

A line is handed to the operating system at once: a killed run loses nothing it wrote. A bucket
cannot append: there the file is written whole by `flush`. A resumed run first drops what lies at or
beyond the step it starts from, so the file reads as if the run had never stopped.
"""

import json
import math
from collections.abc import Mapping

from etils import epath


class LocalJsonLines:
    """Appends to a file."""

    def __init__(self, path, first_step):
        truncate(path, first_step)
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def holds(self, step: int, name: str) -> bool:
        """Whether a line of that step has that metric."""
        return _holds(self._path.read_text(encoding="utf-8"), step, name)

    def write(self, step: int, values: Mapping) -> None:
        self._file.write(_line(step, values))
        self._file.flush()

    def flush(self) -> None:
        pass  # is done at every write

    def close(self) -> None:
        self._file.close()


class RemoteJsonLines:
    """Keeps the lines in memory until they are flushed."""

    def __init__(self, path, first_step):
        self._path = path
        self._text = _before(path, first_step) if path.exists() else ""

    def holds(self, step: int, name: str) -> bool:
        """Whether a line of that step has that metric."""
        return _holds(self._text, step, name)

    def write(self, step: int, values: Mapping) -> None:
        self._text += _line(step, values)

    def flush(self) -> None:
        self._path.write_text(self._text, encoding="utf-8")

    def close(self) -> None:
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
    try:
        return line.endswith("\n") and json.loads(line)["step"] < first_step
    except (ValueError, KeyError, TypeError, RecursionError):  # no line of ours
        return False


def _holds(text, step, name):
    return any(line["step"] == step and name in line for line in map(json.loads, text.splitlines()))


def _line(step, values):
    return json.dumps({"step": step} | _without_nan(values)) + "\n"


def _without_nan(value):
    """JSON has no NaN and no infinity: null stands for both, so that every reader can read the file."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return value if math.isfinite(value) else None
