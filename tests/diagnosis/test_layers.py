"""The diagnosis of layers: by hand on small matrices, and against what a run measures itself."""

import sys
import weakref

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath

from moe_erc import coupling_penalty
from moe_erc.diagnosis import layers as diagnosis
from moe_erc.diagnosis.alignment import alignment
from moe_erc.diagnosis.coupling import measure_coupling
from moe_erc.diagnosis.of_model import draw, write_diagnosis
from moe_erc.diagnosis.tables import of_layers, verdict
from tests.tolerance import assert_close, magnitude

# Ten squarings give sigma_max of gates of at most 36 columns to this accuracy, which is not near 0.
SQUARED = np.log(36) / 2**11


def layer_with_matrix(M_EE):
    """Parameters whose M is the given matrix.

    Router rows are unit vectors and gates are diagonal: |e_i @ diag(m)| = m_i.
    """
    return np.eye(len(M_EE)), np.stack([np.diag(column) for column in np.array(M_EE).T])


def diagnose(layers, count=None, **options):
    """The diagnosis of layers that are numbered 0, 1, …"""
    return diagnosis.diagnose(layers, range(count or len(layers)), **options)


def test_the_best_matching_and_what_it_gains_by_hand():
    # The trace is 1 + 1 + 2 = 4. With rows 0 and 1 exchanged it is 3 + 2 + 2 = 7, three quarters
    # more. Row 2 stays.
    swapped = layer_with_matrix([[1.0, 3.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    coupled = layer_with_matrix([[2.0, 0.5, 1.0], [0.5, 2.0, 0.0], [1.0, 0.0, 2.0]])
    dead = layer_with_matrix([[0.0, 1.0], [1.0, 0.0]])
    _, measures, _, matrices = diagnose([swapped, coupled])
    assert_close(measures["coupling/displaced_rows"], [2 / 3, 0], terms=4)
    assert_close(measures["coupling/matching_gain"], [3 / 4, 0], terms=8)
    assert_close(matrices["raw"][0], [[1, 3, 0], [2, 1, 0], [0, 1, 2]], terms=8)
    # The relative matrix is sqrt(D) M / (|e_i| |column j|).
    # The columns of `swapped` have the lengths sqrt(5), sqrt(11) and 2.
    lengths_E = np.sqrt([5, 11, 4])
    assert_close(matrices["normalized"][0], 3**0.5 * matrices["raw"][0] / lengths_E, terms=8)
    assert np.isinf(diagnose([dead]).measures["coupling/matching_gain"][0])


def random_layers(count=2, experts=5, width=40, hidden=36):
    rng = np.random.default_rng(0)
    return [
        (rng.normal(size=(experts, width)), rng.normal(size=(experts, width, hidden)))
        for _ in range(count)
    ]


def test_it_agrees_with_what_a_run_measures_of_itself():
    layers = random_layers()
    measures = diagnose(layers).measures
    for name, value_L in measure_coupling(*map(jnp.stack, zip(*layers, strict=True))).items():
        # sigma_max comes from Lanczos steps here, and from squarings there.
        if name == "coupling/alignment":
            np.testing.assert_allclose(measures[name], value_L, rtol=SQUARED)
        # Other measures are sums over width and hidden and over 25 pairs; spreads are small
        # differences of norms.
        else:
            assert_close(np.float32(measures[name]), value_L, terms=40 + 36 + 25, label=name)


def test_alignment_is_that_of_all_singular_values():
    router_ED, w_gate_EDF = random_layers(1)[0]
    w_gate_EDF[1] *= 1e-25  # its squares are below the range of float32
    w_gate_EDF[2] = 0
    sigma_E = np.linalg.svd(w_gate_EDF, compute_uv=False)[:, 0]
    response_E = np.linalg.norm(np.einsum("ed,edf->ef", router_ED, w_gate_EDF), axis=1)
    expected_E = response_E / (np.linalg.norm(router_ED, axis=1) * np.where(sigma_E, sigma_E, 1))
    expected_E[1] = 0  # the float32 norm of the response is 0
    found = diagnose([(router_ED, w_gate_EDF)]).measures["coupling/alignment"]
    assert_close(np.float32(found), [expected_E.mean()], terms=40 + 36)
    small = diagnose([(router_ED[:, :8], w_gate_EDF[:, :8, :6])]).measures["coupling/alignment"]
    exact = alignment(jnp.array(router_ED[None, :, :8]), jnp.array(w_gate_EDF[None, :, :8, :6]))
    np.testing.assert_allclose(small, exact.mean(axis=1), rtol=SQUARED)


def test_noise_is_drawn_by_seed_and_averaged():
    layers = random_layers(1)
    one, same, other = (diagnose(layers, draws=8, seed=seed) for seed in (0, 0, 1))
    noisy, matrices = one.measures["erc/noisy"], one.matrices
    assert (noisy == same.measures["erc/noisy"]).all() and (
        noisy != other.measures["erc/noisy"]
    ).any()
    # The noise has mean 1, so the noisy matrix scatters about the clean one. A penalty is convex,
    # so noise adds to it. The mean of eight draws of 40 coordinates, uniform within a bound of at
    # most 1, deviates by 1 / sqrt(3 * 8 * 40) = 0.03.
    np.testing.assert_allclose(matrices["noisy"], matrices["raw"], rtol=0.2)
    assert (matrices["noisy"] != matrices["raw"]).all()
    assert noisy[0] > float(coupling_penalty(matrices["noisy"][0], 1.0))


def test_norms_change_the_raw_measures_alone():
    [(router_ED, w_gate_EDF)] = random_layers(1)
    scaled = (
        router_ED * np.array([1, 2, 4, 8, 16])[:, None],
        w_gate_EDF * np.array([9, 1, 5, 1, 2])[:, None, None],
    )
    plain, loud = (diagnose([layer], draws=1) for layer in ((router_ED, w_gate_EDF), scaled))
    for name in set(plain.normalized) - {"erc/noisy"}:  # the noise bound knows the lengths of rows
        found, expected = (np.float32(each.normalized[name]) for each in (loud, plain))
        assert_close(
            found, expected, terms=40 + 36 + 25, largest=max(1, magnitude(expected)), label=name
        )
    assert loud.measures["erc/vanishing_alpha"] > 2 * plain.measures["erc/vanishing_alpha"]


def test_a_layer_is_let_go_before_the_next_is_read():
    before = []

    def layers():
        for router_ED, w_gate_EDF in random_layers(3):
            assert not before or before.pop()() is None
            gates = w_gate_EDF.astype(np.float32)
            before.append(weakref.ref(gates))
            yield router_ED, gates
            del gates

    assert len(diagnose(layers(), 3, draws=1).measures["erc/alpha_1"]) == 3


def test_low_precision_is_computed_in_float32():
    router_ED, w_gate_EDF = random_layers(1)[0]
    stored = router_ED.astype(np.float16), w_gate_EDF.astype(ml_dtypes.bfloat16)
    whole = tuple(array.astype(np.float32) for array in stored)
    found, expected = diagnose([stored]).measures, diagnose([whole]).measures
    for name in ("erc/alpha_1", "erc/alpha_2", "coupling/alignment"):
        assert_close(np.float32(found[name]), np.float32(expected[name]), terms=40 + 36 + 25)


def test_the_verdict_and_the_tables_say_what_was_measured(tmp_path):
    # ERC at alpha 1 of the second layer: M01 = 3 exceeds the bars 2 and 2 of its row and its
    # column by 1 each: 2 / 4.
    layers = (
        layer_with_matrix([[2.0, 1.0], [0.0, 2.0]]),
        layer_with_matrix([[2.0, 3.0], [0.0, 2.0]]),
    )
    found = diagnosis.diagnose(layers, [3, 5])
    said = verdict(found.measures)
    assert (
        said.startswith("1 of 2 layers are coupled")
        and "at alpha 1.5." in said
        and "75% of the router rows" in said
        and "coupling, not quality" in said
    )
    by_alpha = of_layers(found)[0]
    assert (
        by_alpha.columns[:2] == ("layer", "ERC at alpha 1")
        and by_alpha.columns[-1] == "vanishing alpha"
    )
    assert [row[:3] for row in by_alpha.rows] == [(3, "0.0000", "0.0000"), (5, "0.5000", "0.0000")]
    write_diagnosis(epath.Path(tmp_path), "a model", found, {"figures/m.png": "A matrix."})
    written = (tmp_path / "diagnosis.md").read_text()
    assert (
        written.startswith("# Diagnosis of a model")
        and said in written
        and "![A matrix.](figures/m.png)" in written
    )
    assert "| 5 | 0.5000 | 0.0000 |" in written and (tmp_path / "diagnosis.json").exists()


def test_without_the_extra_for_figures_the_diagnosis_is_written_without_them(
    tmp_path, monkeypatch, capsys
):
    found = diagnosis.diagnose([layer_with_matrix([[2.0, 1.0], [0.0, 2.0]])], [0])
    # What is None in the table of modules cannot be imported.
    for module in ("matplotlib", "moe_erc.diagnosis.documents", "moe_erc.diagnosis.figures"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    directory = epath.Path(tmp_path)
    pictures = draw(directory, "a model", found)
    write_diagnosis(directory, "a model", found, pictures)
    assert pictures == {}
    assert "matplotlib" in capsys.readouterr().out
    assert (tmp_path / "diagnosis.md").exists()
    assert not (tmp_path / "figures").exists()
