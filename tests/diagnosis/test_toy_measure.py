"""A measure from outside the package: nothing else is touched, and it is everywhere under its one name."""

import json

import pytest

from moe_erc.diagnosis.curves import read_metrics
from moe_erc.diagnosis.documents import compare
from moe_erc.diagnosis.run_figures import run_figures
from moe_erc.measures.registry import GROUPS, MEASURES
from tests import script
from tests.diagnosis.toy import TOYS

PROGRAM = """
import runpy
from moe_erc.measures.registry import MEASURES
from tests.diagnosis.toy import TOYS

for toy in TOYS:
    MEASURES[toy.key] = toy
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def trained(text_directory, tmp_path_factory):
    """(directory of a run of two steps that knows the toys, what it printed)."""
    directory = tmp_path_factory.mktemp("toys")
    (directory / "program.py").write_text(PROGRAM)
    arguments = [
        "--config=configs/erc.py:debug",
        f"--config.data.sources=('{text_directory}',)",
        f"--config.data.cache_dir={directory / 'cache'}",
        "--config.data.validation_fraction=0.1",
        "--config.train.steps=2",
        "--config.optimizer.warmup_steps=0",
        "--config.log.every=1",
        "--config.eval.prompt=",
        "--config.log.tensorboard=False",
        f"--workdir={directory / 'run'}",
    ]
    code, printed = script.run(directory / "program.py", arguments, directory / "out")
    assert code == 0, printed
    return directory / "run", printed


@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.key)
def test_a_toy_is_in_metrics_report_table_and_figures(toy, trained, monkeypatch):
    for each in TOYS:
        monkeypatch.setitem(MEASURES, each.key, each)
    directory, printed = trained
    steps_N, value_NL = read_metrics(directory / "metrics.jsonl")[toy.key]
    assert steps_N[-1] == 2 and value_NL.shape == (len(steps_N), 2) and (value_NL > 0).all()
    measures = json.loads((directory / "report.json").read_text())["measures"]
    assert len(measures[toy.key]) == 2
    assert all(word in printed for word in toy.label.split())  # a heading may go over two lines

    run = {"metrics": read_metrics(directory / "metrics.jsonl"), "measures": measures}
    title = GROUPS[toy.group].title
    for name in (f"{title} over training", f"{title} by layer"):
        figure, _ = run_figures({"a": run})[name]
        assert toy.axis in [ax.get_ylabel().replace("\n", " ") for ax in figure.axes], name
    rows = [row for table in compare({"a": measures}) for row in table.rows]
    assert toy.axis in [row[0] for row in rows]


def test_the_toys_are_of_no_other_test():
    assert not {toy.key for toy in TOYS} & MEASURES.keys()
