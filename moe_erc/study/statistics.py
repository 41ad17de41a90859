"""Is an arm of a study different from its control? Intervals, equivalence, power and a verdict.

    difference   mean(arm) - mean(control), with Welch's interval for unequal variances
    family       of several arms each is compared with the same control: Dunnett's intervals
    equivalent   two one-sided Welch tests reject |difference| >= margin at the level 1 - confidence
    detectable   the difference that samples of these sizes and deviations show with the power

Samples are one number per finished run. scipy.stats computes every test.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import optimize, stats

from moe_erc.checks import BadInput

Direction = Literal["higher", "lower"]
CONFIDENCE = 0.95
POWER = 0.8
LEAST_RUNS = 2  # of an arm; one number has no deviation
LARGEST_SHIFT = 35.0  # of a difference in standard errors
MOST_RUNS = 10_000  # per arm; what needs more is not worth planning


class Interval(NamedTuple):
    """A difference of means with its confidence interval, in the unit of the outcome."""

    difference: float
    low: float
    high: float


class Comparison(NamedTuple):
    """One arm beside the control; differences are arm minus control."""

    runs: int
    mean: float
    deviation: float  # standard deviation over runs
    interval: Interval
    p_value: float  # of no difference; Dunnett's where there are several arms
    detectable: float
    verdict: str


def welch(
    arm_N: Sequence[float], control_N: Sequence[float], confidence: float = CONFIDENCE
) -> Interval:
    """The difference of two means and Welch's confidence interval.

    Two samples without any deviation have an interval of length 0.
    """
    difference = float(np.mean(arm_N) - np.mean(control_N))
    if np.ptp(arm_N) == 0 and np.ptp(control_N) == 0:
        return Interval(difference, difference, difference)
    found = stats.ttest_ind(arm_N, control_N, equal_var=False).confidence_interval(confidence)
    return Interval(difference, float(found.low), float(found.high))


def equivalence_p_value(arm_N: Sequence[float], control_N: Sequence[float], margin: float) -> float:
    """The p value of two one-sided Welch tests: small where |difference| is below `margin`."""
    if np.ptp(arm_N) == 0 and np.ptp(control_N) == 0:
        return float(abs(arm_N[0] - control_N[0]) >= margin)
    shifted_up_N = np.asarray(arm_N) + margin
    shifted_down_N = np.asarray(arm_N) - margin
    above = stats.ttest_ind(shifted_up_N, control_N, equal_var=False, alternative="greater").pvalue
    below = stats.ttest_ind(shifted_down_N, control_N, equal_var=False, alternative="less").pvalue
    return float(max(above, below))


def power(
    difference: float,
    deviations: tuple[float, float],
    runs: tuple[int, int],
    confidence: float = CONFIDENCE,
) -> float:
    """The probability that a two-sided Welch test finds a difference of means.

    Args:
      difference: the true difference.
      deviations: the true standard deviations of arm and control.
      runs: how many runs arm and control have, at least 2 each.
    """
    variances = [deviation**2 / count for deviation, count in zip(deviations, runs, strict=True)]
    error = math.sqrt(sum(variances))
    if error == 0:
        return float(difference != 0)
    # Welch and Satterthwaite's degrees of freedom.
    freedom = sum(variances) ** 2 / sum(
        variance**2 / (count - 1) for variance, count in zip(variances, runs, strict=True)
    )
    critical = stats.t.ppf((1 + confidence) / 2, freedom)
    shift = abs(difference) / error
    if shift > LARGEST_SHIFT:  # the noncentral distribution is not computed so far out
        return 1.0
    far_side = stats.nct.cdf(-critical, freedom, shift)
    return float(stats.nct.sf(critical, freedom, shift) + (0 if np.isnan(far_side) else far_side))


def detectable_difference(
    deviations: tuple[float, float],
    runs: tuple[int, int],
    confidence: float = CONFIDENCE,
    wanted: float = POWER,
) -> float:
    """The smallest true difference that a study of these sizes finds with the power `wanted`."""
    error = math.sqrt(
        sum(deviation**2 / count for deviation, count in zip(deviations, runs, strict=True))
    )
    if error == 0:
        return 0.0
    low = 0.0
    high = error
    while power(high, deviations, runs, confidence) < wanted:
        high *= 2
    return float(
        optimize.brentq(
            lambda difference: power(difference, deviations, runs, confidence) - wanted, low, high
        )
    )


def runs_needed(
    difference: float,
    deviations: tuple[float, float],
    confidence: float = CONFIDENCE,
    wanted: float = POWER,
) -> int | None:
    """How many runs of each arm find a true difference; None above `MOST_RUNS`."""
    for count in _growing(LEAST_RUNS, MOST_RUNS):
        if power(difference, deviations, (count, count), confidence) >= wanted:
            break
    else:
        return None
    # The first count of the growing sequence that suffices lies at most a tenth above the smallest.
    smallest = max(LEAST_RUNS, int(count / 1.1) - 1)
    candidates = range(smallest, count + 1)
    return next(
        n for n in candidates if power(difference, deviations, (n, n), confidence) >= wanted
    )


def _growing(first: int, last: int):
    count = first
    while count <= last:
        yield count
        count = max(count + 1, int(count * 1.1))


def compare(
    arms: Mapping[str, Sequence[float]],
    control_N: Sequence[float],
    *,
    better: Direction,
    margin: float,
    confidence: float = CONFIDENCE,
) -> dict[str, Comparison]:
    """Every arm beside the control.

    Args:
      arms: {name: outcome of each finished run}, at least two runs each.
      control_N: the same of the control.
      better: whether a higher or a lower outcome is better.
      margin: the largest difference that counts as none, in the unit of the outcome.

    Raises:
      BadInput: for an arm with fewer than two runs, and for a margin that is not positive.
    """
    if not margin > 0:
        raise BadInput(
            f"margin: {margin} is not above 0; give the largest difference that counts as none"
        )
    for name, values in {"the control": control_N, **arms}.items():
        if len(values) < LEAST_RUNS:
            raise BadInput(
                f"{name} has {len(values)} finished runs; a comparison needs at least {LEAST_RUNS}"
            )
    intervals, p_values = _family(arms, control_N, confidence)
    return {
        name: _compare_one(
            values, control_N, intervals[name], p_values[name], better, margin, confidence
        )
        for name, values in arms.items()
    }


def _family(arms, control_N, confidence):
    """({arm: interval}, {arm: p value}); Welch's for one arm, Dunnett's for several."""
    samples = list(arms.values())
    if len(samples) > 1 and any(np.ptp(values) > 0 for values in [*samples, control_N]):
        # Dunnett's distribution is integrated by quasi Monte Carlo: a fixed generator gives the
        # same digits each time.
        found = stats.dunnett(*samples, control=control_N, rng=np.random.default_rng(0))
        bounds = found.confidence_interval(confidence)
        ends = zip(arms, samples, bounds.low, bounds.high, strict=True)
        mean = np.mean(control_N)
        intervals = {
            name: Interval(float(np.mean(values) - mean), float(low), float(high))
            for name, values, low, high in ends
        }
        return intervals, dict(zip(arms, map(float, found.pvalue), strict=True))
    intervals = {name: welch(values, control_N, confidence) for name, values in arms.items()}
    return intervals, {name: _welch_p_value(values, control_N) for name, values in arms.items()}


def _welch_p_value(arm_N, control_N):
    if np.ptp(arm_N) == 0 and np.ptp(control_N) == 0:
        return float(np.mean(arm_N) == np.mean(control_N))
    return float(stats.ttest_ind(arm_N, control_N, equal_var=False).pvalue)


def _compare_one(arm_N, control_N, interval, p_value, better, margin, confidence):
    deviations = (float(np.std(arm_N, ddof=1)), float(np.std(control_N, ddof=1)))
    runs = (len(arm_N), len(control_N))
    return Comparison(
        runs=len(arm_N),
        mean=float(np.mean(arm_N)),
        deviation=deviations[0],
        interval=interval,
        p_value=p_value,
        detectable=detectable_difference(deviations, runs, confidence),
        verdict=_verdict(arm_N, control_N, interval, deviations, better, margin, confidence),
    )


def _verdict(arm_N, control_N, interval, deviations, better, margin, confidence):
    """In words: the interval excludes 0, or the equivalence test rejects, or neither."""
    if interval.low > 0 or interval.high < 0:
        improved = interval.difference > 0 if better == "higher" else interval.difference < 0
        return "better" if improved else "worse"
    if equivalence_p_value(arm_N, control_N, margin) < 1 - confidence:
        return f"equivalent within {margin:g}"
    needed = runs_needed(margin, deviations, confidence)
    if needed is None:
        return f"cannot tell: n above {MOST_RUNS} would be needed for a difference of {margin:g}"
    return f"cannot tell: n = {needed} would be needed for a difference of {margin:g}"
