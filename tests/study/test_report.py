"""Reports from rows whose truth is known: coverage, verdicts, A/A, the page, the figure."""

import json
import pathlib

import numpy as np
import pytest

from moe_erc.checks import BadInput
from moe_erc.study import arms, report, rows
from tests.study.conftest import AA

ROOT = pathlib.Path(__file__).parents[2]
DRAWS = 400
ENVIRONMENT = {"kind": "cpu", "devices": 1}


def draw(plan, means, deviation=0.01, seed=0, count=None):
    """Rows whose outcomes are normal around the mean of their arm."""
    rng = np.random.default_rng(seed)
    found = []
    for arm, mean in means.items():
        for number in plan.study.seeds_of(arm)[:count]:
            outcome = float(rng.normal(mean, deviation))
            found.append(rows.signed({
                "arm": arm,
                "seed": number,
                "config": plan.settings[arm].values,
                "commit": "abc",
                "environment": ENVIRONMENT,
                "corpus": "c",
                "tokens": 512,
                "seconds": 3.0,
                "outcome": outcome,
                "curve": [[1, outcome + 1], [2, outcome]],
                "measures": {"router/max_load": [1.0, 1.0 + number % 2]},
            }))  # fmt: skip
    return found


def write(plan, found):
    plan.rows_path.parent.mkdir(exist_ok=True)
    plan.rows_path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


@pytest.mark.parametrize("difference, verdict", [
    (-0.05, "better"),
    (0.05, "worse"),
    (0.0, "equivalent within 0.02"),
])  # fmt: skip
def test_verdicts_on_drawn_rows(make_plan, difference, verdict):
    plan = make_plan(seeds="16", margin="0.02")
    found = report.findings(plan, draw(plan, {"vanilla": 2.0, "erc": 2.0 + difference}))
    assert report.verdict(found, "erc") == verdict


def test_too_few_runs_cannot_tell_and_one_run_has_no_verdict(make_plan):
    plan = make_plan(seeds="4", margin="0.005")
    few = report.findings(plan, draw(plan, {"vanilla": 2.0, "erc": 2.0}))
    assert report.verdict(few, "erc").startswith("cannot tell: n = ")
    one = report.findings(plan, draw(plan, {"vanilla": 2.0, "erc": 2.0}, count=1))
    assert report.verdict(one, "erc").startswith("none yet: 2 runs")
    assert "n = 1 of 4" in report.to_print(plan, one.rows)
    assert "n = 0 of 4" in report.to_print(plan, [])


def test_intervals_of_reports_cover_the_truth_in_95_of_100_studies(make_plan):
    plan = make_plan(seeds="6", control_seeds="9")
    covered = 0
    for seed in range(DRAWS):
        found = report.findings(plan, draw(plan, {"vanilla": 2.0, "erc": 1.99}, seed=seed))
        interval = found.comparisons["erc"].interval
        covered += interval.low <= -0.01 <= interval.high
    assert abs(covered / DRAWS - 0.95) < 4 * np.sqrt(0.95 * 0.05 / DRAWS)


def test_no_verdict_is_printed_where_the_aa_study_finds_a_difference(make_plan, write_study):
    write_study("equal", **AA, seeds="8")
    plan = make_plan(aa="'equal'", seeds="8")
    found = draw(plan, {"vanilla": 2.0, "erc": 1.9})
    assert "is not finished" in report.markdown(plan, found)
    write(plan.aa, draw(plan.aa, {"vanilla": 2.0, "again": 2.0}, seed=1))
    assert report.verdict(report.findings(plan, found), "erc") == "better"
    write(plan.aa, draw(plan.aa, {"vanilla": 2.0, "again": 2.1}))
    withheld = report.verdict(report.findings(plan, found), "erc")
    assert withheld.startswith("no verdict: the A/A study equal finds a difference of 0.")
    for text in (report.markdown(plan, found), report.to_print(plan, found)):
        assert "better" not in text.replace("lower is better", "").replace("is better or worse", "")


def test_the_page_has_a_table_between_markers_and_is_written_anew(make_plan, tmp_path):
    plan = make_plan(seeds="4", margin="0.02", also="('router/max_load',)")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "results.md").write_text("# Results\n\nWords.\n", encoding="utf-8")
    write(plan, draw(plan, {"vanilla": 2.0, "erc": 1.9}, 0.001, count=3))
    report.write(plan, docs)
    first = (docs / "results.md").read_text("utf-8")
    assert first.startswith("# Results\n\nWords.\n\n<!-- study small -->\n\n## small\n")
    assert "| erc | 3 of 4 | 1." in first and "| better |" in first and "| control |" in first
    assert "1.2500 ±" in first or "1.1667 ±" in first or "1.3333 ±" in first
    (docs / "results.md").write_text(first + "\nMore words.\n", encoding="utf-8")
    write(plan, draw(plan, {"vanilla": 2.0, "erc": 1.9}, 0.001))
    report.write(plan, docs)
    second = (docs / "results.md").read_text("utf-8")
    assert "| erc | 4 | 1." in second and second.endswith(
        "<!-- end of study small -->\n\nMore words.\n"
    )
    assert second.count("<!-- study small -->") == 1
    figure = (docs / "figures" / "small.png").read_bytes()
    report.write(plan, docs)
    assert (docs / "figures" / "small.png").read_bytes() == figure and figure.startswith(b"\x89PNG")


def test_a_marker_without_its_end_is_refused():
    with pytest.raises(BadInput, match="end of study small"):
        report.between_markers("<!-- study small -->\nlost", "small", "text")


def test_several_arms_are_compared_by_dunnett(make_plan):
    three = "{name: Arm('configs/erc.py:debug', {'losses.erc.alpha': a}) for name, a in "
    three += "[('a', 1.0), ('b', 2.0), ('c', 3.0)]}"
    plan = make_plan(arms=three, control="'a'", seeds="8", margin="0.02")
    text = report.markdown(plan, draw(plan, {"a": 2.0, "b": 1.9, "c": 2.1}))
    assert "Dunnett's 95 % interval" in text
    of_arms = [line for line in text.splitlines() if line[:4] in ("| b ", "| c ")]
    assert [line.split(" | ")[-1] for line in of_arms] == ["better |", "worse |"]


def test_rows_fit_their_studies_and_the_page_has_their_numbers():
    """Nobody edits a row, a study after its runs, or a table."""
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    for path in sorted((ROOT / "studies" / "rows").glob("*.jsonl")):
        plan = arms.open_plan(ROOT / "studies" / f"{path.stem}.py")
        found = rows.read_rows(plan)
        _, _, section = page.partition(f"<!-- study {plan.name} -->")
        section, _, _ = section.partition("<!-- end of study")
        for line in report.markdown(plan, found).splitlines():
            cells = line.split(" | ")
            # The page of a study that goes on may be of fewer runs.
            if cells[0].strip("| ") in plan.settings and " | ".join(cells[:2]) + " |" in section:
                # Arm, n, mean and deviation: a p value may round in another way elsewhere.
                assert " | ".join(cells[:4]) in section, (
                    f"python study.py --study={plan.path} --report"
                )
