"""The curves of a run, read back from metrics.jsonl: {"step": 7, "loss/lm": 1.5, "coupling/erc": [0, 0.2]} a line."""

import collections
import json

import numpy as np
from etils import epath

from moe_erc.checks import BadInput


def read_metrics(path):
    """{metric name: (steps_N, values_N)}, or values_NL of a metric that has a value a layer; null reads as NaN.

    Steps ascend; what was written last of a step counts. A last line that a killed run tore is left out.

    Raises:
      ValueError: for any other line that is not JSON.
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
