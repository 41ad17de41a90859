"""What is drawn: labels, lines, bands, scales. How it looks is for eyes."""

import importlib
import io
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from moe_erc.diagnosis import figures

MATRIX_LEE = np.arange(18.0).reshape(2, 3, 3)


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_line_a_run_with_one_look_in_all_panels():
    panels = {
        "loss (nats)": {"a": ([1, 2], [5, 4]), "b": ([1, 2], [5, 3])},
        "alignment": {"b": ([1, 2], [0.5, 0.75])},
    }
    figure = figures.curves(panels, "step")
    left, right = figure.axes
    assert (left.get_xlabel(), left.get_ylabel()) == ("step", "loss\n(nats)")
    assert (right.get_xlabel(), right.get_ylabel()) == ("step", "alignment")
    assert [line.get_ydata().tolist() for line in left.lines] == [[5, 4], [5, 3]]
    (again,) = right.lines
    for look in ("color", "linestyle", "marker"):
        assert getattr(again, f"get_{look}")() == getattr(left.lines[1], f"get_{look}")()
        assert getattr(again, f"get_{look}")() != getattr(left.lines[0], f"get_{look}")()
    assert legend(figure) == ["a", "b"]


def test_a_run_looks_the_same_where_others_are_missing():
    series = {"b": ([1, 2], [5, 4])}
    (line,) = figures.curves({"loss": series}, "step", ("a", "b")).axes[0].lines
    assert line.get_color() == figures.COLORS[1]
    assert not figures.curves({"loss": series}, "step", ("a", "b")).legends  # one line needs none


def test_of_values_by_layer_the_mean_and_a_band():
    (ax,) = figures.curves({"load": {"a": ([1, 2], [[1, 2, 6], [2, 2, 2]])}}, "step").axes
    assert ax.lines[0].get_ydata().tolist() == [3, 2]
    (band,) = ax.collections
    at_first = [y for x, y in band.get_paths()[0].vertices if x == 1]
    assert (min(at_first), max(at_first)) == (1, 6)


def test_no_two_of_many_lines_look_alike():
    looks = {tuple(figures._style(number).values()) for number in range(140)}
    assert len(looks) == 140


def test_erc_has_a_line_a_layer():
    erc = {"a": [[3, 2], [1, 0], [0, 0]], "b": [[0, 0]]}
    *panels, bar = figures.erc_by_alpha(erc, (1, 2), (0, 4, 8)).axes
    assert [[line.get_ydata().tolist() for line in ax.lines] for ax in panels] == [erc["a"], erc["b"]]
    assert [ax.get_title() for ax in panels] == ["a", "b"]
    assert {(ax.get_xlabel(), ax.get_ylabel()) for ax in panels} == {("alpha", "ERC (norm units)")}
    assert bar.get_ylabel() == "layer" and [tick.get_text() for tick in bar.get_yticklabels()] == ["0", "4", "8"]


def test_maps_share_a_scale_from_0():
    *panels, bar = figures.coupling_maps(MATRIX_LEE, (3, 7)).axes
    assert [ax.get_title() for ax in panels] == ["layer 3", "layer 7"]
    for ax, M_EE in zip(panels, MATRIX_LEE, strict=True):
        (image,) = ax.images
        np.testing.assert_array_equal(image.get_array(), M_EE)  # row i is the proxy, column j the expert
        assert image.get_clim() == (0, 17)
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("expert", "router row (proxy)")
    assert bar.get_ylabel() == "response (norm units)"


def test_coactivation_leaves_the_diagonal_out():
    *panels, _ = figures.coactivation_maps(np.where(np.eye(3), 100, MATRIX_LEE), (0, 1)).axes
    assert np.isnan(np.ma.filled(panels[0].images[0].get_array(), np.nan).diagonal()).all()
    assert panels[0].images[0].get_clim() == (0, 16)  # [1, 2, 1]


def test_load_has_a_row_a_domain():
    ax, _ = figures.load_maps({"layer 0": np.ones((2, 4)) / 4}, "domain", ("code", "prose")).axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["code", "prose"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("expert", "domain")


def test_a_colour_an_expert():
    points_N2, owner_N = np.arange(8.0).reshape(4, 2), np.array([5, 1, 5, 1])
    figure = figures.gate_points(points_N2, owner_N)
    assert legend(figure) == ["expert 1", "expert 5"]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xydata(), [[2, 3], [6, 7]])


def test_the_same_figure_is_the_same_bytes_and_leaves_no_setting_behind():
    before, name = dict(matplotlib.rcParams), r"$\cheaper$"  # no formula
    series = {"a": ([1], [2]), name: ([1], [3])}
    first, second = (figures.png(figures.curves({"loss": series}, "step")) for _ in range(2))
    assert first == second and before == dict(matplotlib.rcParams)
    assert imread(io.BytesIO(first), format="png").shape[1] == figures.WIDTH / 2 * figures.LOOK["savefig.dpi"]


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "moe_erc.diagnosis.figures")
    with pytest.raises(ValueError, match=r"matplotlib, .* pip install -e \"\.\[plot\]\""):
        importlib.import_module("moe_erc.diagnosis.figures")
