"""On samples whose truth is known intervals cover, tests have their size, verdicts are right."""

import numpy as np
import pytest

from moe_erc.checks import BadInput
from moe_erc.study import statistics

DRAWS = 500


def monte_carlo_error(share, draws=DRAWS):
    """Four standard errors of a share that is counted in so many draws; the seeds are fixed."""
    return 4 * np.sqrt(share * (1 - share) / draws)


def test_welch_by_hand():
    # means 2 and 5, variances 1 and 1, n = 3 each: error sqrt(2/3), 4 degrees of freedom, t = 2.776
    interval = statistics.welch([1, 2, 3], [4, 5, 6])
    assert interval.difference == -3
    assert interval.high - interval.low == pytest.approx(2 * 2.7764 * np.sqrt(2 / 3), rel=1e-4)


def test_welch_intervals_cover_with_unequal_variances():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(DRAWS):
        found = statistics.welch(rng.normal(0.3, 1.0, 6), rng.normal(0.0, 3.0, 12))
        covered += found.low <= 0.3 <= found.high
    assert abs(covered / DRAWS - 0.95) < monte_carlo_error(0.95)


def test_several_arms_have_dunnetts_interval():
    """Three arms and a control of six runs have 20 degrees of freedom: 2.54 at 5 % in tables."""
    spread_N = np.array([-1.0, -0.6, -0.2, 0.2, 0.6, 1.0])
    arms = {"a": spread_N, "b": spread_N + 5, "c": spread_N - 5}
    found = statistics.compare(arms, spread_N, better="lower", margin=0.1)
    half = 2.54 * np.std(spread_N, ddof=1) * np.sqrt(2 / 6)
    for name, difference in (("a", 0), ("b", 5), ("c", -5)):
        interval = found[name].interval
        assert interval.difference == pytest.approx(difference, abs=1e-12)
        # Tables have three digits, and scipy integrates to about as many.
        assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=5e-3)
    assert [found[name].verdict for name in "bc"] == ["worse", "better"]


def test_the_equivalence_test_has_its_size_at_the_margin():
    """Where the true difference is the margin, it is called equivalent in 5 % of studies."""
    rng = np.random.default_rng(2)
    p_values = [
        statistics.equivalence_p_value(rng.normal(0.5, 1.0, 100), rng.normal(0.0, 1.0, 100), 0.5)
        for _ in range(DRAWS)
    ]
    assert abs(np.mean(np.array(p_values) < 0.05) - 0.05) < monte_carlo_error(0.05)


def test_power_is_what_simulation_finds():
    rng = np.random.default_rng(3)
    expected = statistics.power(1.0, (1.0, 2.0), (10, 12))
    found = []
    for _ in range(DRAWS):
        interval = statistics.welch(rng.normal(1.0, 1.0, 10), rng.normal(0.0, 2.0, 12))
        found.append(interval.low > 0 or interval.high < 0)
    assert abs(np.mean(found) - expected) < monte_carlo_error(expected)


def test_power_grows_to_one_and_is_the_size_without_a_difference():
    assert statistics.power(0.0, (1.0, 1.0), (8, 8)) == pytest.approx(0.05, abs=1e-6)
    assert statistics.power(10.0, (1.0, 1.0), (8, 8)) > 0.999


def test_the_detectable_difference_is_found_with_the_power_asked_for():
    delta = statistics.detectable_difference((0.01, 0.01), (17, 17))
    assert statistics.power(delta, (0.01, 0.01), (17, 17)) == pytest.approx(0.8, abs=1e-6)
    # Seventeen runs per arm show a difference of one standard deviation: the textbook case of a t
    # test.
    assert delta == pytest.approx(0.01, rel=0.02)


def test_the_number_of_runs_needed_is_the_smallest_that_suffices():
    for difference in (0.3, 1.0, 2.5):
        needed = statistics.runs_needed(difference, (1.0, 1.0))
        assert statistics.power(difference, (1.0, 1.0), (needed, needed)) >= 0.8
        assert (
            needed == 2 or statistics.power(difference, (1.0, 1.0), (needed - 1, needed - 1)) < 0.8
        )
    assert statistics.runs_needed(1.0, (1.0, 1.0)) == 17
    assert statistics.runs_needed(1e-6, (1.0, 1.0)) is None


@pytest.mark.parametrize("shift, better, verdict", [
    (-1.0, "lower", "better"),
    (-1.0, "higher", "worse"),
    (1.0, "lower", "worse"),
    (1.0, "higher", "better"),
])  # fmt: skip
def test_a_difference_is_named_by_what_is_better(shift, better, verdict):
    rng = np.random.default_rng(4)
    found = statistics.compare(
        {"arm": rng.normal(shift, 0.1, 8)}, rng.normal(0, 0.1, 8), better=better, margin=0.1
    )
    assert found["arm"].verdict == verdict


def test_equal_arms_are_equivalent_with_many_runs_and_undecided_with_few():
    rng = np.random.default_rng(5)
    few = statistics.compare(
        {"arm": rng.normal(0, 1, 4)}, rng.normal(0, 1, 4), better="lower", margin=0.2
    )
    many = statistics.compare(
        {"arm": rng.normal(0, 1, 2000)}, rng.normal(0, 1, 2000), better="lower", margin=0.2
    )
    assert few["arm"].verdict.startswith("cannot tell: n = ")
    assert many["arm"].verdict == "equivalent within 0.2"


def test_runs_without_any_deviation():
    same = statistics.compare({"arm": [1.0, 1.0]}, [1.0, 1.0], better="lower", margin=0.1)["arm"]
    other = statistics.compare({"arm": [2.0, 2.0]}, [1.0, 1.0], better="lower", margin=0.1)["arm"]
    assert same.interval == (0, 0, 0) and other.verdict == "worse"


@pytest.mark.parametrize("arms, control, margin, words", [
    ({"a": [1.0]}, [1.0, 2.0], 0.1, ["a has 1", "at least 2"]),
    ({"a": [1.0, 2.0]}, [1.0], 0.1, ["the control has 1"]),
    ({"a": [1.0, 2.0]}, [1.0, 2.0], 0.0, ["margin", "0.0", "above 0"]),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(arms, control, margin, words):
    with pytest.raises(BadInput) as refusal:
        statistics.compare(arms, control, better="lower", margin=margin)
    assert all(word in str(refusal.value) for word in words)
