"""Which figures come of which data."""

import numpy as np
import pytest

from moe_erc.diagnosis.run_figures import run_figures
from moe_erc.measures.registry import MEASURES, find

OVER_TRAINING = ["Training losses", "ERC of the clean router", "Coupling", "Routing"]
BY_LAYER = ["ERC of the clean router", "Coupling", "Router rows and gates", "Experts", "Routing"]
SHARED = [
    *(f"{title} over training" for title in OVER_TRAINING),
    *(f"{title} by layer" for title in BY_LAYER),
    "ERC by alpha",
    "load by layer",
]
MATRICES = {"router/load": (2, 4), "coupling/matrix": (2, 4, 4), "use/coactivation": (2, 4, 4)}


@pytest.fixture
def run():
    """Makes a run of two layers, four experts; its measures are all `value`."""

    def make(value):
        steps_N = np.array([10, 20])
        keys = ("erc/alpha_1", "coupling/noise_bound", "router/max_load")
        measured = [key for key, measure in MEASURES.items() if measure.per_layer and measure.group != "use"]
        metrics = dict.fromkeys(keys, (steps_N, np.full((2, 2), value)))
        return {
            "metrics": {"loss/lm": (steps_N, np.full(2, value))} | metrics,
            "measures": {key: np.full(MATRICES.get(key, 2), value) for key in measured if key != "coupling/matrix"},
        }

    return make


def use():
    by_layer = {"use/domain_divergence": [0.0, 0.0], "use/token_specialization": [0.5, 0.5]}
    domains = dict.fromkeys(("validation/code", "validation/prose", "validation/web", "validation/mean"), 2.0)
    return by_layer | domains | {"use/load": np.ones((3, 2, 4)), "use/coactivation": np.ones((2, 4, 4))}


def test_of_one_run_all_that_its_data_allow(run):
    assert list(run_figures({"a": run(0.5)})) == SHARED
    more = run(0.5) | {"layers": [3, 5], "gates": {"layer": 5, "points_N2": np.eye(2), "owner_N": np.array([0, 1])}}
    more["measures"] |= use() | {"coupling/matrix": np.ones((2, 4, 4))}
    found = run_figures({"a": more})
    own = [f"{name} of a" for name in ("coupling matrices", "gate map", "load by domain", "co-activation")]
    shared = list(SHARED)
    shared.insert(shared.index("ERC by alpha"), "Use of experts by layer")
    assert list(found) == [*shared, *own]
    for figure, caption in found.values():
        assert all(ax.get_ylabel() and (ax.get_xlabel() or ax.get_label() == "<colorbar>") for ax in figure.axes)
        assert caption.endswith(".")
    assert found["coupling matrices of a"][0].axes[1].get_title() == "layer 5"
    assert "layer 5" in found["gate map of a"][1]
    of_domains = found["load by domain of a"][0].axes[:-1]
    assert [ax.get_title() for ax in of_domains] == ["layer 0", "layer 1"]
    assert [tick.get_text() for tick in of_domains[0].get_yticklabels()] == ["code", "prose", "web"]
    assert found["Coupling by layer"][0].axes[0].lines[0].get_xdata().tolist() == [3, 5]
    np.testing.assert_array_equal(found["load by layer"][0].axes[0].images[0].get_array(), np.full((2, 4), 0.25))


def test_a_panel_has_the_label_of_its_measure(run):
    found = run_figures({"a": run(0.5)})
    for name, key in (("Coupling over training", "coupling/noise_bound"), ("Coupling by layer", "coupling/alignment")):
        labels = [ax.get_ylabel().replace("\n", " ") for ax in found[name][0].axes]
        assert find(key).axis in labels
    assert find("coupling/alignment").axis == "alignment (share of sigma_max, higher is better)"


def test_runs_are_compared_and_those_without_router_rows_left_out_of_coupling(run):
    runs = {"aoe": run(0.25), "erc": run(0.5), "vanilla": run(1.0)}
    for part in ("metrics", "measures"):
        of_rows = ("erc/", "coupling/", "weights/")
        runs["aoe"][part] = {key: value for key, value in runs["aoe"][part].items() if not key.startswith(of_rows)}
    found = {name: figure for name, (figure, _) in run_figures(runs).items()}
    assert list(found) == SHARED
    lines = {
        name: {line.get_label(): line for line in figure.axes[0].lines}
        for name, figure in found.items()
        if name not in ("ERC by alpha", "load by layer")
    }
    for name, by_run in lines.items():
        without = name.startswith(("Coupling", "ERC", "Router rows"))
        assert list(by_run) == (["erc", "vanilla"] if without else ["aoe", "erc", "vanilla"]), name
    assert len({by_run["erc"].get_color() for by_run in lines.values()}) == 1
    assert [ax.get_title() for ax in found["ERC by alpha"].axes[:-1]] == ["erc", "vanilla"]
    assert [ax.get_title() for ax in found["load by layer"].axes[:-1]] == ["aoe", "erc", "vanilla"]


def test_the_noise_bound_against_the_alpha_of_runs(run):
    alphas = (1.0, 0.5, 0.75, 0.25, 1.5)
    runs = {f"erc {alpha}": run(1 - alpha / 2) | {"alpha": alpha} for alpha in alphas} | {"vanilla": run(0.5)}
    (ax,) = run_figures(runs)["noise bound by alpha"][0].axes
    assert ax.lines[0].get_xydata().tolist() == [[alpha, 1 - alpha / 2] for alpha in sorted(alphas)]
    assert ax.get_xlabel() == "alpha"


def test_of_nothing_nothing():
    assert run_figures({}) == {} and run_figures({"a": {"metrics": {}, "measures": {}}}) == {}
