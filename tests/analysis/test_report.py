"""The printed tables, with coupling and without."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.analysis.coupling import measure_coupling
from moe_erc.analysis.report import ROWS, print_report, write_report

MEASURES = ("noise_bound", "diagonal_rows", "diagonal_columns", "alignment", "row_cosine")
MEASURES += ("router_norm", "router_spread", "gate_norm", "gate_spread", "vanishing_alpha")


@pytest.fixture
def report():
    coupling = {f"{name}_L": np.array([value, value + 0.5]) for value, name in enumerate(MEASURES)}
    return {
        "validation": {
            "loss": 2.0,
            "domains": {"prose": {"loss": 2.0, "bits_per_byte": 1.0, "tokens": 1000}},
            "load_LE": np.array([[0.5, 0.25, 0.25, 0.0], [0.0, 1.0, 0.0, 0.0]]),
        },
        "baselines": {"unigram": {"prose": 4.0}, "bigram": {"prose": 3.0}},
        "coupling": coupling | {"erc_LA": np.array([[0.5, 0.25, 0, 0, 0], [0.75, 0, 0, 0, 0]])},
    }


def printed(report, capsys):
    """({first cell of a row: its other cells}, all of it)."""
    print_report(report)
    text = capsys.readouterr().out
    rows = (line.strip("│┃ ").split("│") for line in text.splitlines() if "│" in line)
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}, text


def test_coupling_and_load_by_layer(report, capsys):
    rows, text = printed(report, capsys)
    assert "ERC of the clean router" in text and rows["2"] == ["0.2500", "0.0000"]
    assert rows["alignment"] == ["3.000", "3.500"] and rows["row cosine"] == ["4.000", "4.500"]
    assert rows["gate norm"] == ["7.000", "7.500"] and rows["gate spread"] == ["8.000", "8.500"]
    assert "output cosine" not in rows
    assert rows["highest load"] == ["2.00x", "4.00x"] and rows["lowest load"] == ["0.00x", "0.00x"]
    # shares 1/2, 1/4, 1/4, 0: (1/2 * 1 + 2 * 1/4 * 2) / log2(4) bits = 1.5 / 2; all on one expert: 0
    assert rows["load entropy"] == ["0.750", "0.000"]
    assert rows["MaxVio"] == ["1.00", "3.00"]  # 1/2 * 4 - 1, 1 * 4 - 1


def test_without_router_rows_all_but_coupling_is_printed(report, capsys, tmp_path):
    report |= {"coupling": None, "specialization": {"output_cosine_L": np.array([0.25, -0.125])}}
    rows, text = printed(report, capsys)
    assert "ERC" not in text and not {"noise bound", "alignment", "row cosine", "gate norm"} & rows.keys()
    assert rows["prose"] == ["2.000", "1.000", "4.000", "3.000", "1,000"]
    assert rows["output cosine"] == ["0.250", "-0.125"] and rows["MaxVio"] == ["1.00", "3.00"]
    write_report(tmp_path / "report.json", report)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["coupling"] is None and found["specialization"] == {"output_cosine_L": [0.25, -0.125]}


def test_output_cosine_stands_beside_coupling(report, capsys):
    report["specialization"] = {"output_cosine_L": np.array([0.25, -0.125])}
    rows, _ = printed(report, capsys)
    assert rows["output cosine"] == ["0.250", "-0.125"] and rows["alignment"] == ["3.000", "3.500"]


def test_every_row_but_the_optional_is_a_measure_of_coupling():
    measures = jax.eval_shape(measure_coupling, jnp.ones((1, 2, 3)), jnp.ones((1, 2, 3, 4)))
    assert set(ROWS.values()) - measures.keys() == {"output_cosine_L"}


def test_one_expert_is_balanced(report, capsys):
    report["validation"]["load_LE"] = np.ones((2, 1))
    rows, _ = printed(report, capsys)
    assert rows["load entropy"] == ["1.000", "1.000"] and rows["MaxVio"] == ["0.00", "0.00"]
