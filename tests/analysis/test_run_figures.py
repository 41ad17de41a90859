"""Which figures come of which data."""

import numpy as np
import pytest

from moe_erc.analysis.run_figures import BY_LAYER, run_figures

SHARED = [
    "loss over training",
    "coupling over training",
    "load over training",
    "coupling by layer",
    "norms by layer",
    "answers by layer",
    "ERC by alpha",
]


@pytest.fixture
def run():
    """Makes a run of two layers, four experts; its measures are all `value`."""

    def make(value):
        steps_N = np.array([10, 20])
        by_layer = dict.fromkeys(
            ("coupling/erc", "coupling/noise_bound", "router/max_load"), (steps_N, np.full((2, 2), value))
        )
        measures = {key: [value] * 2 for panels, _ in BY_LAYER.values() for _, key in panels.values()}
        return {
            "metrics": {"loss/lm": (steps_N, np.full(2, value))} | by_layer,
            "report": {
                "validation": {"load_LE": np.full((2, 4), value)},
                "coupling": measures | {"erc_LA": np.full((2, 5), value)},
                "specialization": {"output_cosine_L": [value] * 2},
            },
        }

    return make


def use():
    pairs_LEE = np.full((2, 4, 4), 2) + 2 * np.eye(4, dtype=int)
    counts = {"counts_LVE": np.ones((2, 3, 4)), "occurrences_V": np.full(3, 2), "pairs_LEE": pairs_LEE}
    return {"domains": ["code", "prose", "web"], "load_GLE": np.ones((3, 2, 4))} | counts


def test_of_one_run_all_that_its_data_allow(run):
    assert list(run_figures({"a": run(0.5)})) == [*SHARED, "load by layer"]
    more = {
        "coupling": {"layers": [3, 5], "matrix_LEE": np.ones((2, 4, 4))},
        "gates": {"layer": 5, "points_N2": np.eye(2), "owner_N": np.array([0, 1])},
        "use": use(),
    }
    found = run_figures({"a": run(0.5) | more})
    own = [f"{name} of a" for name in ("coupling matrices", "gate map", "load by domain", "co-activation")]
    assert list(found) == [*SHARED, "specialisation by layer", "load by layer", *own]
    for figure, caption in found.values():
        assert all(ax.get_ylabel() and (ax.get_xlabel() or ax.get_label() == "<colorbar>") for ax in figure.axes)
        assert caption.endswith(".")
    assert found["coupling matrices of a"][0].axes[1].get_title() == "layer 5"
    assert "layer 5" in found["gate map of a"][1]
    assert [ax.get_title() for ax in found["load by domain of a"][0].axes[:-1]] == ["layer 0", "layer 1"]
    specialization = [ax.lines[0].get_ydata().tolist() for ax in found["specialisation by layer"][0].axes]
    assert specialization == [[0, 0], [0.5, 0.5]]  # alike in all domains; 1 of 2 occurrences at every expert
    np.testing.assert_array_equal(found["load by layer"][0].axes[0].images[0].get_array(), np.full((2, 4), 0.25))


def test_runs_are_compared_and_those_without_router_rows_left_out_of_coupling(run):
    runs = {"aoe": run(0.25), "erc": run(0.5), "vanilla": run(1.0)}
    runs["aoe"]["report"]["coupling"] = None
    del runs["aoe"]["metrics"]["coupling/erc"], runs["aoe"]["metrics"]["coupling/noise_bound"]
    found = {name: figure for name, (figure, _) in run_figures(runs).items()}
    lines = {
        name: {line.get_label(): line for line in figure.axes[0].lines}
        for name, figure in found.items()
        if name not in ("ERC by alpha", "load by layer")
    }
    for name in SHARED[:-1]:
        without = name in ("coupling over training", "coupling by layer", "norms by layer")
        assert list(lines[name]) == (["erc", "vanilla"] if without else ["aoe", "erc", "vanilla"]), name
    assert len({by_run["erc"].get_color() for by_run in lines.values()}) == 1
    assert [ax.get_title() for ax in found["ERC by alpha"].axes[:-1]] == ["erc", "vanilla"]
    assert [ax.get_title() for ax in found["load by layer"].axes[:-1]] == ["aoe", "erc", "vanilla"]


def test_epsilon_against_the_alpha_of_runs(run):
    alphas = (1.0, 0.5, 0.75, 0.25, 1.5)
    runs = {f"erc {alpha}": run(1 - alpha / 2) | {"alpha": alpha} for alpha in alphas} | {"vanilla": run(0.5)}
    (ax,) = run_figures(runs)["epsilon by alpha"][0].axes
    assert ax.lines[0].get_xydata().tolist() == [[alpha, 1 - alpha / 2] for alpha in sorted(alphas)]
    assert ax.get_xlabel() == "alpha"


def test_of_nothing_nothing():
    assert run_figures({}) == {} and run_figures({"a": {"metrics": {}, "report": {}}}) == {}
