"""The curves of a run, read back from metrics.jsonl.

A line is {"step": 7, "loss/lm": 1.5, "coupling/erc": [0, 0.2]}.
"""

import collections
import json

import numpy as np
from etils import epath

from moe_erc.checks import BadInput


def read_metrics(path: epath.PathLike) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The curve of every metric: {metric name: (steps_N, values_N)}.

    A metric with one value for every layer has values_NL. null becomes NaN. Steps ascend, and the
    last value that was written for a step is taken. A last line that a killed run left incomplete
    is ignored.

    Raises:
      BadInput: for any other line that is not the JSON of a step.
    """
    values = collections.defaultdict(dict)
    lines = epath.Path(path).read_bytes().decode(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            step = row.pop("step")
        except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
            if number == len(lines):
                break
            raise BadInput(f"{path}: line {number} is not JSON of a step") from None
        for name, value in row.items():
            values[name][step] = value
    return {name: _curve(by_step) for name, by_step in values.items()}


def _curve(by_step):
    steps = sorted(by_step)
    return np.array(steps), np.array([by_step[step] for step in steps], float)
