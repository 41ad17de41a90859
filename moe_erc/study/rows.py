"""The rows of a study: one line of JSON for each finished run, with a digest of the line.

    {"arm": "erc", "seed": 1000, ..., "outcome": 1.877, "measures": {...}, "digest": "0f3a..."}

The file is made anew from its own lines and from the row that every finished run leaves in its
directory. So several machines may share it: what one of them overwrites, the next one adds again.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_erc.checks import BadInput
from moe_erc.data import cache
from moe_erc.diagnosis.curves import read_metrics
from moe_erc.diagnosis.report import read_report
from moe_erc.measures.registry import curves
from moe_erc.measures.training import TOKENS_PER_S
from moe_erc.study.arms import Plan, Run
from moe_erc.study.files import write_whole

DIGEST = "digest"
ROW = "row.json"  # in the directory of a finished run
DIGITS = 6  # of the measures beside the outcome

Row = Mapping[str, Any]


class NoOutcome(Exception):
    """A run that ended without what a row needs."""


def make_row(plan: Plan, run: Run, directory: pathlib.Path, commit: str) -> Row:
    """The row of a finished run, from its metrics.jsonl and report.json.

    Raises:
      NoOutcome: for a run that has not finished, or has no finite outcome.
    """
    steps = run.settings.config.train.steps
    report = read_report(directory / "report.json", steps)
    if report is None:
        raise NoOutcome(f"'{directory / 'report.json'}' is not the report of step {steps}")
    metrics = read_metrics(directory / "metrics.jsonl")
    curve = outcome_curve(metrics, plan.measure.key)
    last = [value for _, value in curve[-plan.study.evaluations :]]
    outcome = float(np.mean(last)) if last else math.nan
    if len(last) < plan.study.evaluations or not math.isfinite(outcome):
        raise NoOutcome(f"{plan.measure.key} of '{directory}' is {last} at its last evaluations")
    measures = {key: _rounded(value) for key, value in curves(report["measures"]).items()}
    return signed({
        "arm": run.arm,
        "seed": run.seed,
        "config": run.settings.values,
        "config_digest": run.settings.digest,
        "commit": commit,
        "environment": report["environment"],
        "corpus": report["corpus"],
        "tokens": run.settings.tokens,
        "seconds": _rounded(seconds_of_training(metrics, run.settings.tokens)),
        "outcome": outcome,
        "curve": curve,
        "measures": measures,
    })  # fmt: skip


def outcome_curve(metrics: Mapping, key: str) -> list[list[float]]:
    """[step, value] at every evaluation; of a measure by layer the mean over layers."""
    if key not in metrics:
        return []
    steps_N, values = metrics[key]
    values_NL = np.reshape(values, (len(steps_N), -1))
    means_N = np.mean(values_NL, axis=1)
    return [[int(step), float(mean)] for step, mean in zip(steps_N, means_N, strict=True)]


def seconds_of_training(metrics: Mapping, tokens: int) -> float:
    """How long the steps took at their median speed: without compilation and evaluation."""
    _, speed_N = metrics[TOKENS_PER_S.key]
    return tokens / float(np.median(speed_N))


def _rounded(value: Any) -> Any:
    """Numbers and lists of numbers with six digits; None for one that is not finite."""
    if isinstance(value, list | tuple | np.ndarray):
        return [_rounded(item) for item in value]
    number = float(value)
    return float(f"{number:.{DIGITS}g}") if math.isfinite(number) else None


def signed(row: Row) -> Row:
    """The row with its digest."""
    content = {name: value for name, value in row.items() if name != DIGEST}
    content = json.loads(json.dumps(content))
    return content | {DIGEST: cache.digest(content)}


def read_rows(plan: Plan) -> list[Row]:
    """The rows of a study that are in its file, in the order of arms and seeds.

    Raises:
      BadInput: for a line that is no row, for one whose digest fails, and for a row of an arm, a
        config or a corpus that is not the study's.
    """
    rows = _read(plan.rows_path)
    _check(plan, rows, plan.rows_path)
    return rows


def _read(path: pathlib.Path) -> list[Row]:
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        where = f"'{path}', line {number}"
        try:
            row = json.loads(line)
        except ValueError:
            raise BadInput(
                f"{where}: this is no row; take it out, and its run is made again"
            ) from None
        if not isinstance(row, dict) or signed(row) != row:
            raise BadInput(
                f"{where}: the digest fails, so the row was edited; "
                "put it back, or take it out and its run is made again"
            )
        rows.append(row)
    return rows


def _check(plan: Plan, rows: Sequence[Row], path: pathlib.Path) -> None:
    corpus_by_data: dict[str, Row] = {}
    seen = set()
    for row in rows:
        where = f"'{path}': the row {row['arm']}-{row['seed']}"
        if row["arm"] not in plan.settings:
            known = ", ".join(plan.settings)
            raise BadInput(f"{where} is of no arm of the study ({known}); give studies two names")
        if (row["arm"], row["seed"]) in seen:
            raise BadInput(f"{where} is there twice; take one out")
        seen.add((row["arm"], row["seed"]))
        check_config(plan, row["arm"], row["config"], where)
        data = {key: value for key, value in row["config"].items() if key.startswith("data.")}
        first = corpus_by_data.setdefault(json.dumps(data, sort_keys=True), row)
        if first["corpus"] != row["corpus"]:
            raise BadInput(
                f"{where} was made with the corpus {row['corpus']}, and "
                f"{first['arm']}-{first['seed']} with {first['corpus']}; they cannot be compared"
            )


def check_config(plan: Plan, arm: str, config: Mapping[str, Any], where: str) -> None:
    """Refuses a config that is not that of the arm, and names the first key that differs.

    A key that is younger than `config` has to have its default in the arm. A key that there is no
    more is not compared.
    """
    for key, value in plan.settings[arm].values.items():
        before = config.get(key, plan.defaults[key])
        if before != value:
            raise BadInput(
                f"{where} has another config than the arm: {key} is {before!r} there and "
                f"{value!r} in the study; give the changed study a new name"
            )


def check_corpus(rows: Iterable[Row], run: Run, identity: str) -> None:
    """Refuses rows of the same settings of `data` that were made with another corpus."""
    mine = {key: value for key, value in run.settings.values.items() if key.startswith("data.")}
    for row in rows:
        theirs = {key: row["config"].get(key, value) for key, value in mine.items()}
        if theirs == mine and row["corpus"] != identity:
            raise BadInput(
                f"the row {row['arm']}-{row['seed']} was made with the corpus {row['corpus']}, and "
                f"data.sources give {identity} here: the text has changed (the embedded corpus is "
                "that of the installed versions); use the same text, or a study of a new name"
            )


def keep_row(directory: pathlib.Path, row: Row) -> None:
    """Leaves the row of a finished run in its directory."""
    write_whole(directory / ROW, json.dumps(row))


def collect(plan: Plan, directory: pathlib.Path) -> list[Row]:
    """All rows: those of the file, and those of finished runs below `directory`, which it gains.

    A row that is in the file stays as it is.
    """
    rows = {(row["arm"], row["seed"]): row for row in read_rows(plan)}
    known = set(rows)
    for run in plan.runs:
        path = directory / run.name / ROW
        if (run.arm, run.seed) not in rows and path.exists():
            (row,) = _read(path)
            rows[run.arm, run.seed] = row
    arms = list(plan.settings)
    ordered = sorted(rows.values(), key=lambda row: (arms.index(row["arm"]), row["seed"]))
    _check(plan, ordered, plan.rows_path)
    if set(rows) != known:
        lines = [json.dumps(row) for row in ordered]
        write_whole(plan.rows_path, "\n".join(lines) + "\n")
    return ordered
