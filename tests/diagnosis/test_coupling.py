"""The measures on matrices small enough to work by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc import coupling_matrix, coupling_penalty, noise_bound, sharding
from moe_erc.diagnosis.coupling import measure_coupling
from moe_erc.measures.erc import ALPHAS
from moe_erc.measures.registry import reading
from tests.tolerance import assert_close, magnitude, within


def layers_with_matrices(*matrices):
    """Router rows are unit vectors and gates diagonal, so that M is the matrix given: |e_i @ diag(m)| = m_i."""
    experts = len(matrices[0])
    router_LED = jnp.stack([jnp.eye(experts)] * len(matrices))
    w_gate_LEDF = jnp.stack([jnp.stack([jnp.diag(jnp.array(M)[:, j]) for j in range(experts)]) for M in matrices])
    return router_LED, w_gate_LEDF


def by_alpha(measures):
    """ERC, (L, A)."""
    return np.stack([measures[f"erc/alpha_{alpha:g}"] for alpha in ALPHAS], axis=1)


def test_measures_by_hand():
    # M01 = 3 over diagonals 2 and 4: ratios 1.5 and 0.75; M20 = 2 over 1 and 2: 2 and 1; M12 = 1 over 4 and 1: 1
    M = [[2.0, 3.0, 0.5], [0.5, 4.0, 1.0], [2.0, 0.5, 1.0]]
    measures = measure_coupling(*layers_with_matrices(M))
    assert measures["erc/vanishing_alpha"][0] == pytest.approx(2.0)
    assert measures["coupling/diagonal_rows"][0] == pytest.approx(1 / 3)  # row 1 alone
    assert measures["coupling/diagonal_columns"][0] == pytest.approx(1.0)  # 2 >= 2, 4 >= 3, 1 >= 1
    # alpha 1: bars (2, 4, 1): M01 exceeds bar 0 by 1, M20 exceeds bar 2 by 1: 2 / 9; alpha 2 and above: 0
    assert_close(by_alpha(measures)[0], [2 / 9, 0, 0, 0, 0], terms=8)
    assert measures["weights/router_norm"][0] == pytest.approx(1.0) and measures["weights/router_spread"][0] == 0
    gates = [np.linalg.norm(np.array(M)[:, j]) for j in range(3)]
    assert measures["weights/gate_norm"][0] == pytest.approx(np.mean(gates))
    assert measures["weights/gate_spread"][0] == pytest.approx(np.std(gates), abs=within(8) * max(gates))
    assert measures["coupling/noise_bound"][0] == pytest.approx(2**0.5 / 2)


def test_erc_is_zero_at_the_vanishing_alpha_and_positive_below_it():
    rng = np.random.default_rng(0)
    router_LED, w_gate_LEDF = rng.normal(size=(2, 5, 7)), rng.normal(size=(2, 5, 7, 4))
    measures = measure_coupling(router_LED, w_gate_LEDF)
    for layer in range(2):
        M_EE = coupling_matrix(router_LED[layer], w_gate_LEDF[layer])
        alpha = float(measures["erc/vanishing_alpha"][layer])
        assert coupling_penalty(M_EE, alpha * 1.0001) == 0
        assert coupling_penalty(M_EE, alpha * 0.999) > 0
        terms = 7 + 4 + 25  # sums over D and F, and over pairs
        assert_close(by_alpha(measures)[layer], [coupling_penalty(M_EE, each) for each in ALPHAS], terms)
        assert_close(measures["coupling/noise_bound"][layer], jnp.mean(noise_bound(router_LED[layer])), terms=7 + 5 + 8)


def test_gates_over_a_mesh_are_measured_the_same():
    rng, mesh = np.random.default_rng(0), sharding.make_mesh(2, 4)
    router_LED, w_gate_LEDF = rng.normal(size=(2, 8, 7)), rng.normal(size=(2, 8, 7, 4))
    alone, over_mesh = measure_coupling(router_LED, w_gate_LEDF), measure_coupling(router_LED, w_gate_LEDF, mesh)
    # Sums over D and F, and over pairs; spreads and the cosine of all rows are small differences of numbers of about 1.
    for name, expected in alone.items():
        assert_close(over_mesh[name], expected, terms=7 + 4 + 64, largest=max(1, magnitude(expected)), label=name)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(over_mesh))  # every process can read them


def test_a_dead_expert_never_couples_and_a_coupled_layer_is_all_diagonal():
    dead, coupled = [[1.0, 0.5], [0.5, 0.0]], [[2.0, 0.5], [0.5, 2.0]]
    measures = measure_coupling(*layers_with_matrices(dead, coupled))
    assert measures["erc/vanishing_alpha"][0] == jnp.inf
    assert measures["erc/vanishing_alpha"][1] == pytest.approx(0.25)
    assert_close(measures["coupling/diagonal_rows"], [0.5, 1], terms=4)
    # layer 0 at alpha 1: both 0.5 exceed the dead expert's bar by 0.5, M01 as column, M10 as row: (0.5 + 0.5) / 4
    assert_close(measures["erc/alpha_1"], [0.25, 0], terms=4)
    # gates diag(1, 0.5) and diag(0.5, 0), the second row along its zero: 1 and 0; coupled: 2 / 2 both
    assert_close(measures["coupling/alignment"], [0.5, 1], terms=8)
    keys = [measure.key for measure in (*reading("matrix"), *reading("weights"))]
    assert {key: vector.shape for key, vector in measures.items()} == dict.fromkeys([*keys, "coupling/alignment"], (2,))


@pytest.mark.parametrize("rows, cosine", [
    ([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]], -1 / 3),  # pairs 0, -1, 0
    ([[1.0, 0.0], [3.0, 4.0]], 3 / 5),
    ([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]], 1 / 3),  # pairs 1 and, with the zero row, 0, 0
    ([[1.0, 1.0]], 0),  # no pairs
])  # fmt: skip
def test_row_cosine_by_hand(rows, cosine):
    measures = measure_coupling(jnp.array([rows]), jnp.ones((1, len(rows), 2, 3)))
    assert_close(measures["weights/row_cosine"][0], cosine, terms=8, largest=1)  # cosines that cancel
    assert jnp.isfinite(measures["coupling/alignment"][0])
