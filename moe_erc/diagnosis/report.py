"""report.json and eval.json: what was measured of a run, written and read back.

{"step": 300, "history": [...], "measures": {"validation/mean": 1.9, "coupling/alignment": [0.4,
0.5], ...}}
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moe_erc.measures.load import LOAD
from moe_erc.measures.registry import of_load


def make_report(step: int, history: Sequence[str], found: Mapping[str, Any]) -> dict:
    """The report of a step, from the measures that evaluators found; those of the load are
    added.
    """
    return {
        "step": step,
        "history": list(history),
        "measures": dict(found) | of_load(found[LOAD.key]),
    }


def write_report(path, report: Mapping[str, Any]) -> None:
    """`report` as JSON, null for None and numbers that are not finite."""
    write_text(path, json.dumps(_plain(report), indent=1))


def read_report(path, step: int) -> dict | None:
    """The report at `path` if it is of that step, with NaN where a number was not finite; None
    without one.
    """
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it is written anew
        return None
    if not isinstance(report, dict) or report.get("step") != step or "measures" not in report:
        return None
    return _with_nan(report)


def _with_nan(value):
    """Lists of numbers as `_plain` found them; a part that is None stays so."""
    if isinstance(value, dict):
        return {name: _with_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [math.nan if item is None else _with_nan(item) for item in value]
    return value


def write_text(path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path, content: bytes) -> None:
    """A reader sees the old file or the new one, never a part; its directory is made.

    On a pod process 0 writes; `path` is an `etils.epath.Path`, local or in a bucket.
    """
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(content)
        temporary.replace(path)


def _plain(value):
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    value = np.asarray(value).tolist()
    if value is None:
        return None
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str) or math.isfinite(value) else None
