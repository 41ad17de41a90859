"""Gates whose columns lie far apart, on a map."""

import sys

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from moe_erc.diagnosis.gate_map import gate_map


@pytest.fixture(autouse=True)
def one_thread():
    """So few points are soonest done by one, above all on a busy machine."""
    import sklearn.manifold  # noqa: F401, a library's threads can be limited once it is loaded

    with threadpool_limits(1):
        yield


def test_columns_of_one_expert_lie_together():
    centre_ED = np.array([[9.0, 0, 0], [100, 100, 100], [0, 9, 0], [-9, 0, 9]])
    w_gate_EDF = centre_ED[..., None] + np.random.default_rng(0).normal(size=(4, 3, 16))
    points_N2, owner_N = gate_map(w_gate_EDF, (3, 0, 2), 8, seed=0)
    assert points_N2.shape == (48, 2) and owner_N.tolist() == [3] * 16 + [0] * 16 + [2] * 16
    # Where a single point ends up depends on every rounding of a thousand steps, and a stray one proves nothing. Of
    # experts whose columns lie five times as far apart as an expert's own, the medians tell: points without a map are
    # as far from others' as from their own, on maps that roundings led elsewhere it was at least ten times.
    distance_NN = np.linalg.norm(points_N2[:, None] - points_N2[None], axis=-1)
    alike_NN = owner_N[:, None] == owner_N
    own = np.median(distance_NN[alike_NN & ~np.eye(48, dtype=bool)])
    assert own < np.median(distance_NN[~alike_NN]) / 3
    np.testing.assert_array_equal(gate_map(w_gate_EDF, (3, 0, 2), 8, seed=0)[0], points_N2)


def test_more_neighbours_than_points_are_all_of_them():
    points_N2, owner_N = gate_map(np.random.default_rng(0).normal(size=(2, 3, 4)), [1], 30, seed=0)
    assert np.isfinite(points_N2).all() and owner_N.tolist() == [1] * 4


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(ValueError, match="expert 4 is not one of the 4 experts, 0 to 3"):
        gate_map(np.ones((4, 3, 8)), (0, 4), 30, seed=0)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ValueError, match=r"scikit-learn: pip install -e \"\.\[plot\]\""):
        gate_map(np.ones((4, 3, 8)), (0,), 30, seed=0)
