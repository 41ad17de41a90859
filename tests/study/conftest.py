"""Studies of two-step runs, and a stand-in for train.py that ends at once."""

import textwrap

import pytest

from moe_erc.study import arms

# Writes what train.py leaves, from the seed alone. A run waits while the file `wait` is beside it.
STAND_IN = """
import json, pathlib, sys, time

given = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
directory = pathlib.Path(given["workdir"])
seed = int(given["config.seed"])
with open(directory / "starts", "a", encoding="utf-8") as file:
    file.write("x")
while (directory.parent / "wait").exists():
    time.sleep(0.02)
if (directory.parent / "fail").exists():
    sys.exit("the disk is full")
loss = 2 + 0.01 * (seed % 7)
lines = [{"step": 1, "validation/mean": loss + 1, "speed/tokens_per_s": 100.0}]
lines += [{"step": 2, "validation/mean": loss, "speed/tokens_per_s": 100.0, "router/load": [1, 1]}]
text = "".join(json.dumps(line) + "\\n" for line in lines)
(directory / "metrics.jsonl").write_text(text, encoding="utf-8")
measures = {"validation/mean": loss, "erc/alpha_1": [0.0, 0.5]}
measures["router/max_load"] = [1.5, float(seed)]
environment = {"kind": "cpu", "devices": 1, "mesh": {"data": 1, "expert": 1}, "versions": {}}
report = {"step": 2, "measures": measures, "environment": environment, "corpus": CORPUS}
(directory / "report.json").write_text(json.dumps(report), encoding="utf-8")
"""
FIELDS = {
    "hypothesis": "'ERC changes nothing.'",
    "control": "'vanilla'",
    "arms": "{'vanilla': Arm('configs/vanilla.py:debug'), 'erc': Arm('configs/erc.py:debug')}",
    "overrides": "SHORT",
    "seeds": "2",
    "outcome": "'validation/mean'",
    "margin": "0.005",
    "decision": "'Nothing follows.'",
}
HEAD = """
from moe_erc.study.plan import Arm, Study

SHORT = {
    "train.steps": 2,
    "eval.every": 1,
    "optimizer.warmup_steps": 0,
    "data.sources": ("planted",),
    "data.planted.regimes": 2,
    "data.planted.documents": 2,
    "data.planted.letters": 300,
    "data.planted.validation": 1,
    "eval.prompt": "",
    "eval.windows": 1,
    "eval.report_windows": 1,
    "log.tensorboard": False,
}
"""


@pytest.fixture
def write_study(tmp_path):
    """Writes studies/NAME.py with some fields, as source, that differ; returns its path."""

    def write(name="small", **changes):
        fields = {key: value for key, value in (FIELDS | changes).items() if value is not None}
        lines = "".join(f"    {key}={value},\n" for key, value in fields.items())
        body = f"def get_study():\n  return Study(\n{lines}  )\n"
        path = tmp_path / "studies" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(HEAD + textwrap.dedent(body), encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_plan(write_study):
    """The plan of such a study."""

    def make(name="small", **changes):
        return arms.open_plan(write_study(name, **changes))

    return make


AA = {
    "arms": "{name: Arm('configs/vanilla.py:debug') for name in ('vanilla', 'again')}",
    "is_aa": "True",
}
