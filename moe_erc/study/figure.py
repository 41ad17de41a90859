"""The figure of a study: means with intervals by arm, and curves with bands over seeds."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from moe_erc.diagnosis.figures import COLORS, DASHES, LOOK, WIDTH
from moe_erc.study.report import Findings
from moe_erc.study.statistics import LEAST_RUNS


@matplotlib.rc_context(LOOK)
def draw(found: Findings) -> Figure:
    """Left the outcome of every run, its mean by arm and the interval of the mean; right curves."""
    figure = Figure(figsize=(WIDTH, WIDTH * 0.42), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_means(left, found)
    _draw_curves(right, found)
    return figure


def _draw_means(ax, found):
    arms = [arm for arm, values in found.outcomes.items() if values]
    confidence = found.plan.study.confidence
    for place, arm in enumerate(arms):
        values = found.outcomes[arm]
        color = COLORS[place % len(COLORS)]
        ax.plot(values, [place] * len(values), ".", color=color, alpha=0.4)
        half = half_width(values, confidence)
        ax.errorbar(np.mean(values), place, xerr=half, fmt="o", color=color, capsize=3)
    ax.set_yticks(range(len(arms)), [f"{arm} ({len(found.outcomes[arm])})" for arm in arms])
    ax.invert_yaxis()
    ax.set(xlabel=found.plan.measure.axis)
    ax.set_title(f"runs, means and their {100 * confidence:g} % intervals")
    ax.grid(axis="x")


def _draw_curves(ax, found):
    for place, arm in enumerate(found.outcomes):
        curves = [row["curve"] for row in found.rows if row["arm"] == arm]
        if not curves:
            continue
        color = COLORS[place % len(COLORS)]
        steps_S = np.array([step for step, _ in curves[0]])
        values_NS = np.array([[value for _, value in curve] for curve in curves], float)
        # The first quarter falls so far that nothing would be seen of the differences at the end.
        shown_S = steps_S >= steps_S[-1] / 4
        steps_S = steps_S[shown_S]
        values_NS = values_NS[:, shown_S]
        mean_S = values_NS.mean(axis=0)
        dash = DASHES[place % len(DASHES)]
        ax.plot(steps_S, mean_S, color=color, linestyle=dash, label=arm)
        half_S = [half_width(values_N, found.plan.study.confidence) for values_N in values_NS.T]
        ax.fill_between(steps_S, mean_S - half_S, mean_S + half_S, color=color, alpha=0.15)
    ax.set(xlabel="step", ylabel=found.plan.measure.axis.replace(" (", "\n("))
    ax.set_title(f"means over seeds and their {100 * found.plan.study.confidence:g} % intervals")
    ax.legend()
    ax.grid(axis="y")


def half_width(values: Sequence[float], confidence: float) -> float:
    """Half the length of Student's interval of a mean; 0 of a single value."""
    count = len(values)
    if count < LEAST_RUNS:
        return 0.0
    error = np.std(values, ddof=1) / np.sqrt(count)
    return float(error * stats.t.ppf((1 + confidence) / 2, count - 1))
