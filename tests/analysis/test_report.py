"""The printed tables, with coupling and without."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.analysis.coupling import measure_coupling
from moe_erc.analysis.report import ROWS, print_report, write_report

TITLES = ("Layers: coupling", "Router rows and gates", "Experts and their load")
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


def tables(text):
    """{title: {heading: cells down the page}} of what was printed; parts of a table that was split are joined."""
    found, title = {}, ""
    for line in text.splitlines():
        if line.strip(" ┏┓━┳") and not set(line) & set("┃│┡├└"):
            title = line.split("(")[0].strip()
        elif set(line) & set("┃│"):
            cells = [cell.strip() for cell in line.strip().strip("┃│").replace("┃", "│").split("│")]
            rows = found.setdefault(title, [])
            rows.append((cells, "┃" in line))
    return {title: _columns(rows) for title, rows in found.items()}


def _columns(rows):
    columns, headings = {}, []
    for cells, in_head in rows:
        if in_head:
            continued = headings and not any(columns.get(name) for name in headings)
            joined = [" ".join(pair).strip() for pair in zip(headings, cells, strict=True)] if continued else cells
            for name in headings if continued else ():
                columns.pop(name, None)
            headings = joined
            columns |= {name: [] for name in headings}
        else:
            for name, cell in zip(headings, cells, strict=True):
                columns[name].append(cell)
    return columns


def printed(report, capsys):
    """(tables, all of it) that is printed."""
    print_report(report)
    text = capsys.readouterr().out
    return tables(text), text


def test_coupling_and_load_by_layer(report, capsys):
    found, _ = printed(report, capsys)
    erc = found["ERC of the clean router by alpha"]
    assert erc["layer"] == ["0", "1"] and erc["2"] == ["0.2500", "0.0000"] and erc["vanishes at"] == ["9.00", "9.50"]
    coupling, weights, load = (found[title] for title in TITLES)
    assert coupling["alignment"] == ["3.000", "3.500"] and weights["row cosine"] == ["4.000", "4.500"]
    assert weights["gate norm"] == ["7.000", "7.500"] and weights["gate spread"] == ["8.000", "8.500"]
    assert "output cosine" not in load
    assert load["highest load"] == ["2.00x", "4.00x"] and load["lowest load"] == ["0.00x", "0.00x"]
    # shares 1/2, 1/4, 1/4, 0: (1/2 * 1 + 2 * 1/4 * 2) / log2(4) bits = 1.5 / 2; all on one expert: 0
    assert load["load entropy"] == ["0.750", "0.000"]
    assert load["MaxVio"] == ["1.00", "3.00"]  # 1/2 * 4 - 1, 1 * 4 - 1


def test_without_router_rows_all_but_coupling_is_printed(report, capsys, tmp_path):
    report |= {"coupling": None, "specialization": {"output_cosine_L": np.array([0.25, -0.125])}}
    found, text = printed(report, capsys)
    assert "ERC" not in text and "Router rows and gates" not in found
    assert {name: cells[0] for name, cells in found["Validation, nats per token"].items()} == {
        "domain": "prose",
        "loss": "2.000",
        "bits/byte": "1.000",
        "unigram": "4.000",
        "bigram": "3.000",
        "tokens": "1,000",
    }
    assert "Layers: coupling" not in found
    experts = found["Experts and their load"]
    assert experts["output cosine"] == ["0.250", "-0.125"] and experts["MaxVio"] == ["1.00", "3.00"]
    write_report(tmp_path / "report.json", report)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["coupling"] is None and found["specialization"] == {"output_cosine_L": [0.25, -0.125]}


def test_output_cosine_stands_beside_coupling(report, capsys):
    report["specialization"] = {"output_cosine_L": np.array([0.25, -0.125])}
    found, _ = printed(report, capsys)
    coupling, _, experts = (found[title] for title in TITLES)
    assert experts["output cosine"] == ["0.250", "-0.125"] and coupling["alignment"] == ["3.000", "3.500"]


def of_layers(layers, domain):
    """A report in which every measure of every layer is another number."""
    rng = np.random.default_rng(0)
    coupling = {key: rng.uniform(0.1, 1, layers) for key in (*ROWS.values(), "vanishing_alpha_L")}
    load_LE = rng.uniform(0.1, 1, (layers, 8))
    values = {"loss": 2.0, "bits_per_byte": 1.0, "tokens": 1_234_567_890}
    return {
        "validation": {"loss": 2.0, "domains": {domain: values}, "load_LE": load_LE / load_LE.sum(1, keepdims=True)},
        "baselines": {"unigram": {domain: 4.0}, "bigram": {domain: 3.0}},
        "coupling": coupling | {"erc_LA": rng.uniform(0.1, 1, (layers, 5))},
    }


@pytest.mark.parametrize("columns", ["", "40", "80", "200"])
@pytest.mark.parametrize("layers", [2, 12, 24, 48, 64])
def test_every_number_is_printed_whole_within_80_columns(layers, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)  # of the terminal: what is redirected does not depend on it
    domain = "a_domain_of_a_very_long_name_that_has_no_end_and_goes_on_and_on_for_ever"
    report = of_layers(layers, domain)
    found, text = printed(report, capsys)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    for name, key in ROWS.items():
        (column,) = (found[title][name] for title in TITLES if name in found[title])
        assert f" {name} " in text  # on one line
        assert column == [f"{value:.3f}" for value in report["coupling"][key]], name
    erc = found["ERC of the clean router by alpha"]
    assert erc["layer"] == [str(layer) for layer in range(layers)]
    assert erc["1"] == [f"{row[0]:.4f}" for row in report["coupling"]["erc_LA"]]
    validation = found["Validation, nats per token"]
    assert "1,234,567,890" in validation["tokens"]
    assert domain in "".join(validation["domain"])  # over several lines


def test_every_row_but_the_optional_is_a_measure_of_coupling():
    measures = jax.eval_shape(measure_coupling, jnp.ones((1, 2, 3)), jnp.ones((1, 2, 3, 4)))
    assert set(ROWS.values()) - measures.keys() == {"output_cosine_L"}


def test_one_expert_is_balanced(report, capsys):
    report["validation"]["load_LE"] = np.ones((2, 1))
    load = printed(report, capsys)[0]["Experts and their load"]
    assert load["load entropy"] == ["1.000", "1.000"] and load["MaxVio"] == ["0.00", "0.00"]
