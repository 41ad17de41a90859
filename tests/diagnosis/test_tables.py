"""The printed tables, with coupling and without."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.diagnosis.coupling import measure_coupling
from moe_erc.diagnosis.report import make_report, read_report, write_report
from moe_erc.diagnosis.tables import catalogue, print_found
from moe_erc.measures.registry import GROUPS, MEASURES, of_load, reading

OF_ROWS = ("erc", "coupling", "weights")  # groups that a model without router rows has not
TITLES = tuple(GROUPS[name].title for name in (*OF_ROWS, "experts", "router"))


def by_layer(*groups):
    """The measures of these groups that have one number for each layer."""
    found = [
        measure for measure in MEASURES.values() if measure.per_layer and measure.group in groups
    ]
    return [measure for measure in found if measure.key not in ("coupling/matrix", "router/load")]


def validation(domain="prose", tokens=1000):
    return {
        f"validation/{domain}": 2.0,
        f"bits_per_byte/{domain}": 1.0,
        f"validation_tokens/{domain}": tokens,
        "validation/mean": 2.0,
        f"unigram/{domain}": 4.0,
        f"bigram/{domain}": 3.0,
        "unigram/mean": 4.0,
        "bigram/mean": 3.0,
    }


@pytest.fixture
def found():
    load_LE = np.array([[0.5, 0.25, 0.25, 0.0], [0.0, 1.0, 0.0, 0.0]])
    measured = {}
    for value, measure in enumerate(by_layer(*OF_ROWS)):
        measured[measure.key] = np.array([value, value + 0.5])
    return validation() | measured | {"router/load": load_LE} | of_load(load_LE)


def tables(text):
    """{title: {heading: cells down the page}} of what was printed.

    Parts of a table that was split are joined.
    """
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
            joined = (
                [" ".join(pair).strip() for pair in zip(headings, cells, strict=True)]
                if continued
                else cells
            )
            for name in headings if continued else ():
                columns.pop(name, None)
            headings = joined
            columns |= {name: [] for name in headings}
        else:
            for name, cell in zip(headings, cells, strict=True):
                columns[name].append(cell)
    return columns


def printed(found, capsys):
    """(tables, everything printed)."""
    print_found(found)
    text = capsys.readouterr().out
    return tables(text), text


def test_every_measure_by_layer_stands_in_the_table_of_its_group(found, capsys):
    shown, text = printed(found, capsys)
    assert text.count("coupling, not quality") == 1
    for measure in by_layer(*OF_ROWS):
        column = shown[GROUPS[measure.group].title][measure.label]
        assert column == [measure.show(value) for value in found[measure.key]], measure.key
    assert shown["Coupling"]["layer"][:2] == ["0", "1"]
    assert shown["ERC of the clean router"]["ERC at alpha 2"] == ["1.0000", "1.5000"]


def test_load_by_layer(found, capsys):
    load = printed(found, capsys)[0]["Routing"]
    assert load["highest load"] == ["2.000", "4.000"] and load["lowest load"] == ["0.000", "0.000"]
    # Shares 1/2, 1/4, 1/4, 0 have (1/2 * 1 + 2 * 1/4 * 2) / log2(4) bits = 1.5 / 2.
    # All on one expert: 0.
    assert load["load entropy"] == ["0.750", "0.000"]
    assert load["MaxVio"] == ["1.000", "3.000"]  # 1/2 * 4 - 1, 1 * 4 - 1
    assert load["dead experts"] == ["0.250", "0.750"]


def test_without_router_rows_all_but_coupling_is_printed(found, capsys, tmp_path):
    found = {key: value for key, value in found.items() if key.split("/")[0] not in OF_ROWS}
    found["experts/output_cosine"] = np.array([0.25, -0.125])
    shown, text = printed(found, capsys)
    assert "ERC" not in text and "quality" not in text and not shown.keys() & set(TITLES[:3])
    assert {name: cells for name, cells in shown["Validation, nats per token"].items()} == {
        "domain": ["prose", "mean"],
        "validation loss": ["2.000", "2.000"],
        "bits per byte": ["1.000", ""],
        "unigram": ["4.000", "4.000"],
        "bigram": ["3.000", "3.000"],
        "tokens": ["1,000", ""],
    }
    assert shown["Experts"]["output cosine"] == ["0.250", "-0.125"]
    assert shown["Routing"]["MaxVio"] == ["1.000", "3.000"]
    write_report(tmp_path / "report.json", {"step": 3, "measures": found})
    written = json.loads((tmp_path / "report.json").read_text())["measures"]
    assert "erc/alpha_1" not in written and written["experts/output_cosine"] == [0.25, -0.125]


@pytest.mark.parametrize("columns", ["", "40", "80", "200"])
@pytest.mark.parametrize("layers", [2, 12, 24, 48, 64])
def test_every_number_is_printed_whole_within_80_columns(layers, columns, capsys, monkeypatch):
    # COLUMNS is the width of the terminal. Redirected output does not depend on it.
    monkeypatch.setenv("COLUMNS", columns)
    domain = "a_domain_of_a_very_long_name_that_has_no_end_and_goes_on_and_on_for_ever"
    rng = np.random.default_rng(0)
    measures = by_layer(*OF_ROWS, "experts", "router")
    found = validation(domain, 1_234_567_890) | {
        measure.key: rng.uniform(0.1, 1, layers) for measure in measures
    }
    shown, text = printed(found, capsys)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    for measure in measures:
        table = shown[GROUPS[measure.group].title]
        assert table[measure.label] == [measure.show(value) for value in found[measure.key]], (
            measure.key
        )
        assert table["layer"][:layers] == [str(layer) for layer in range(layers)]
    validated = shown["Validation, nats per token"]
    assert "1,234,567,890" in validated["tokens"]
    assert domain in "".join(validated["domain"])  # over several lines


@pytest.mark.parametrize("group", ["coupling", "weights", "experts"])
def test_the_headings_of_a_group_of_few_measures_stand_on_one_line(group, capsys):
    of_the_host = ("coupling/displaced_rows", "coupling/matching_gain")  # a run has none of them
    measures = [measure for measure in by_layer(group) if measure.key not in of_the_host]
    print_found(validation() | {measure.key: [0.5] for measure in measures})
    text = capsys.readouterr().out
    assert all(f" {measure.label} " in text for measure in measures)


def test_every_measure_of_matrices_and_weights_is_one_of_coupling():
    found = jax.eval_shape(measure_coupling, jnp.ones((1, 2, 3)), jnp.ones((1, 2, 3, 4)))
    assert found.keys() == {
        measure.key for measure in (*reading("matrix"), *reading("weights"))
    } | {"coupling/alignment"}


def test_one_expert_is_balanced(capsys):
    found = make_report(3, ["a line"], validation() | {"router/load": np.ones((2, 1))})["measures"]
    load = printed(found, capsys)[0]["Routing"]
    assert load["load entropy"] == ["1.000", "1.000"] and load["MaxVio"] == ["0.000", "0.000"]


def test_the_page_of_measures_is_that_of_the_table():
    page = pathlib.Path(__file__).parents[2] / "docs" / "measures.md"
    assert page.read_text(encoding="utf-8").endswith(f"\n{catalogue()}\n"), (
        "print(catalogue()) anew"
    )


def test_a_report_is_read_back_with_its_step_alone(tmp_path):
    path = tmp_path / "report.json"
    assert read_report(path, 3) is None
    write_report(
        path,
        make_report(
            3, [], validation() | {"router/load": np.ones((1, 2)), "erc/alpha_1": [np.inf]}
        ),
    )
    assert read_report(path, 2) is None
    measures = read_report(path, 3)["measures"]
    assert measures["validation/mean"] == 2.0 and measures["router/max_load"] == [1.0]
    assert np.isnan(measures["erc/alpha_1"]).all()
    path.write_text('{"step": 3, "validation": {}}')  # the form of another version
    assert read_report(path, 3) is None
