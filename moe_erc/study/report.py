"""What a study found, from its rows alone: a table, a verdict in words for each arm, and a figure.

The text stands in docs/results.md between two markers, so that no number in it is typed by hand:

    <!-- study NAME -->
    ...
    <!-- end of study NAME -->
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from moe_erc.checks import BadInput
from moe_erc.measures.registry import find
from moe_erc.study import statistics
from moe_erc.study.arms import Plan
from moe_erc.study.files import write_whole
from moe_erc.study.rows import Row, read_rows

DIGITS = 4  # behind the point, of the outcome
COLUMNS = (
    "arm", "n", "mean", "sd", "difference", "interval", "detectable", "p", "p of equivalence",
    "verdict",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Findings:
    """The outcomes of a study by arm, and every arm with enough runs beside the control."""

    plan: Plan
    rows: Sequence[Row]
    outcomes: Mapping[str, Sequence[float]]
    comparisons: Mapping[str, statistics.Comparison]
    withheld: str  # why no verdict is printed; "" where verdicts are


def findings(plan: Plan, rows: Sequence[Row]) -> Findings:
    """Compares the arms. The verdicts are withheld where the A/A study finds a difference."""
    outcomes = {arm: [] for arm in plan.settings}
    for row in rows:
        outcomes[row["arm"]].append(row["outcome"])
    comparisons = {}
    control = outcomes[plan.study.control]
    enough = {arm: outcomes[arm] for arm in plan.study.others}
    enough = {arm: values for arm, values in enough.items() if len(values) >= statistics.LEAST_RUNS}
    if enough and len(control) >= statistics.LEAST_RUNS:
        comparisons = statistics.compare(
            enough,
            control,
            better=plan.measure.better,
            margin=plan.study.margin,
            confidence=plan.study.confidence,
        )
    return Findings(plan, rows, outcomes, comparisons, _withheld(plan))


def _withheld(plan: Plan) -> str:
    if plan.aa is None:
        return ""
    found = findings(plan.aa, read_rows(plan.aa))
    for arm, comparison in found.comparisons.items():
        interval = comparison.interval
        if interval.low > 0 or interval.high < 0:
            return (
                f"no verdict: the A/A study {plan.aa.name} finds a difference of "
                f"{_number(interval.difference)} between equal arms ({arm} and "
                f"{plan.aa.study.control})"
            )
    return ""


def to_print(plan: Plan, rows: Sequence[Row]) -> str:
    """What a terminal shows: a line for each arm, with its verdict."""
    found = findings(plan, rows)
    lines = [f"{plan.name}: {plan.study.hypothesis}", _what(plan)]
    for arm, values in found.outcomes.items():
        line = f"  {arm}: n = {len(values)} of {plan.study.runs_of(arm)}"
        if values:
            line += f", mean {_number(np.mean(values))}"
        if len(values) >= statistics.LEAST_RUNS:
            line += f", sd {_number(np.std(values, ddof=1))}"
        if arm in found.comparisons:
            comparison = found.comparisons[arm]
            line += (
                f"; difference {_signed(comparison.interval.difference)}, "
                f"{_interval(comparison.interval)}: {verdict(found, arm)}"
            )
        lines.append(line)
    return "\n".join(lines)


def verdict(found: Findings, arm: str) -> str:
    """The verdict on an arm in words, or why there is none."""
    if arm not in found.comparisons:
        return f"none yet: {statistics.LEAST_RUNS} runs of the arm and of the control are needed"
    return found.withheld or found.comparisons[arm].verdict


def markdown(plan: Plan, rows: Sequence[Row]) -> str:
    """The section of docs/results.md."""
    found = findings(plan, rows)
    lines = [f"## {plan.name}", "", plan.study.hypothesis, "", _what(plan) + " " + rule(plan)]
    lines += [plan.study.decision, "", *_table(found)]
    if plan.study.also and rows:
        lines += ["", "Means and standard deviations over runs of the report at the end of a run:"]
        lines += ["", *_also(found)]
    lines += ["", *_conditions(found)]
    if rows:
        lines += ["", f"![Means and curves of {plan.name}](figures/{plan.name}.png)"]
    return "\n".join(lines)


def _what(plan):
    evaluations = plan.study.evaluations
    last = "the last evaluation" if evaluations == 1 else f"the last {evaluations} evaluations"
    return f"Outcome: {plan.measure.axis}, the mean of {last}."


def rule(plan: Plan) -> str:
    """How a verdict is found, in words."""
    percent = f"{100 * plan.study.confidence:g} %"
    test = "Welch's" if len(plan.study.others) == 1 else "Dunnett's"
    return (
        f"An arm is better or worse where {test} {percent} interval of its difference to "
        f"{plan.study.control} excludes 0. It is equivalent where two one-sided tests reject a "
        f"difference of {plan.study.margin:g} or more."
    )


def _table(found: Findings) -> list[str]:
    plan = found.plan
    confidence = f"{100 * plan.study.confidence:g} % interval"
    heading = [name if name != "interval" else confidence for name in COLUMNS]
    rows = [heading, ["---"] * len(heading)]
    for arm, values in found.outcomes.items():
        rows.append(_cells(found, arm, values))
    return ["| " + " | ".join(row) + " |" for row in rows]


def _cells(found, arm, values):
    plan = found.plan
    count = len(values)
    planned = plan.study.runs_of(arm)
    cells = [arm, f"{count}" if count >= planned else f"{count} of {planned}"]
    cells.append(_number(np.mean(values)) if values else "")
    cells.append(_number(np.std(values, ddof=1)) if count >= statistics.LEAST_RUNS else "")
    if arm == plan.study.control:
        return [*cells, "", "", "", "", "", "control"]
    if arm not in found.comparisons:
        return [*cells, "", "", "", "", "", verdict(found, arm)]
    comparison = found.comparisons[arm]
    control = found.outcomes[plan.study.control]
    equivalence = statistics.equivalence_p_value(values, control, plan.study.margin)
    return [
        *cells,
        _signed(comparison.interval.difference),
        _interval(comparison.interval),
        _number(comparison.detectable),
        f"{comparison.p_value:.3g}",
        f"{equivalence:.3g}",
        verdict(found, arm),
    ]


def _also(found: Findings) -> list[str]:
    measures = [find(key) for key in found.plan.study.also]
    heading = ["arm", *(measure.axis for measure in measures)]
    rows = [heading, ["---"] * len(heading)]
    for arm in found.outcomes:
        rows.append([arm, *(_mean_and_deviation(found, arm, measure) for measure in measures)])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _mean_and_deviation(found, arm, measure):
    """Over runs; of a measure by layer, of its mean over layers."""
    of_arm = [row["measures"] for row in found.rows if row["arm"] == arm]
    values = [measures[measure.key] for measures in of_arm if measure.key in measures]
    if not values:
        return ""
    means = [np.mean(np.array(value, float)) for value in values]
    if len(means) < statistics.LEAST_RUNS:
        return _number(means[0])
    return f"{_number(np.mean(means))} ± {_number(np.std(means, ddof=1))}"


def _conditions(found: Findings) -> list[str]:
    """Where the rows are from, a sentence each."""
    plan = found.plan
    if not found.rows:
        return ["No run has finished yet."]
    tokens = sorted({row["tokens"] for row in found.rows})
    seconds = [row["seconds"] for row in found.rows]
    devices = sorted({_device(row) for row in found.rows})
    corpora = sorted({row["corpus"] for row in found.rows})
    commits = sorted({row["commit"] for row in found.rows})
    lines = [
        f"A run has {' or '.join(f'{count:,}' for count in tokens)} tokens and took "
        f"{np.median(seconds):,.0f} s (median, without compilation) on {' or '.join(devices)}.",
        f"Corpus {', '.join(corpora)}; commit {', '.join(commits)}. "
        "`detectable` is the smallest difference that these runs would show with a probability "
        f"of {statistics.POWER:g}.",
    ]
    if plan.aa is not None:
        lines.append(_say_aa(plan.aa))
    return lines


def _say_aa(aa):
    found = findings(aa, read_rows(aa))
    if not found.comparisons:
        return f"Its A/A study {aa.name} is not finished."
    told = ", ".join(_interval(of.interval) for of in found.comparisons.values())
    return f"Its A/A study {aa.name} finds {told} between equal arms."


def _device(row):
    environment = row["environment"]
    return f"{environment['devices']} x {environment['kind']}"


def write(plan: Plan, docs: pathlib.Path) -> str:
    """Writes the section of docs/results.md and docs/figures/NAME.png; returns what is printed.

    Raises:
      BadInput: for rows that `read_rows` refuses, and without matplotlib.
    """
    rows = read_rows(plan)
    if rows:
        from moe_erc.diagnosis.figures import png  # needs the extra `plot`
        from moe_erc.study.figure import draw

        path = docs / "figures" / f"{plan.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(draw(findings(plan, rows))))
    page = docs / "results.md"
    before = page.read_text(encoding="utf-8") if page.exists() else "# Results\n"
    write_whole(page, between_markers(before, plan.name, markdown(plan, rows)))
    return to_print(plan, rows)


def between_markers(page: str, name: str, section: str) -> str:
    """The page with the section of a study in place of its old one, or at its end."""
    first = f"<!-- study {name} -->"
    last = f"<!-- end of study {name} -->"
    marked = f"{first}\n\n{section}\n\n{last}"
    if first not in page:
        return f"{page.rstrip()}\n\n{marked}\n"
    before, _, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not end:
        raise BadInput(f"docs/results.md: {first!r} has no {last!r} behind it; put it back")
    return before + marked + after


def _number(value):
    return f"{value:.{DIGITS}f}" if abs(value) < 1000 else f"{value:,.0f}"


def _signed(value):
    return f"{value:+.{DIGITS}f}"


def _interval(interval):
    return f"{_signed(interval.low)} to {_signed(interval.high)}"
