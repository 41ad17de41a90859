"""report.json and eval.json: the measures of a run, written and read back.

{"step": 300, "history": [...],
 "measures": {"validation/mean": 1.9, "coupling/alignment": [0.4, 0.5], ...}}
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from moe_erc.measures.load import LOAD
from moe_erc.measures.registry import of_load


def make_report(step: int, history: Sequence[str], found: Mapping[str, Any]) -> dict:
    """The report of a step: the measures that evaluators found, and those of the load."""
    # As one program: each operation alone would be compiled by itself.
    load = jax.device_get(jax.jit(of_load)(found[LOAD.key]))
    return {"step": step, "history": list(history), "measures": dict(found) | load}


def write_report(path: epath.Path, report: Mapping[str, Any]) -> None:
    """Write `report` as JSON; None and numbers that are not finite become null."""
    write_text(path, json.dumps(_plain(report), indent=1))


def read_report(path: epath.Path, step: int) -> dict | None:
    """The report at `path` if it is of that step, else None.

    Numbers that were not finite are NaN.
    """
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a damaged report is written anew
        return None
    if not isinstance(report, dict) or report.get("step") != step or "measures" not in report:
        return None
    return _with_nan(report)


def _with_nan(value):
    """The inverse of `_plain` for lists of numbers; a whole value that is None stays None."""
    if isinstance(value, dict):
        return {name: _with_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [math.nan if item is None else _with_nan(item) for item in value]
    return value


def write_text(path: epath.Path, text: str) -> None:
    """Write a text in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Write a file in one step: a reader sees the old file or the whole new one.

    The directory is created. On a pod only process 0 writes. The path may be local or in a bucket.
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
