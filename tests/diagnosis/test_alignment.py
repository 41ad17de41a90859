"""Singular values against LAPACK's, alignment against numbers worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.compiled import costs
from moe_erc import sharding
from moe_erc.diagnosis.alignment import alignment, largest_singular_value
from tests.tolerance import assert_close

GATE = P(None, "expert", None, "data")


@pytest.mark.parametrize("rows, columns", [(64, 32), (128, 64), (32, 64)])
def test_the_largest_singular_value_of_random_of_low_rank_and_of_zero_matrices(rows, columns):
    rng = np.random.default_rng(0)
    random = rng.normal(size=(4, rows, columns))
    low_rank = rng.normal(size=(2, rows, 3)) @ rng.normal(size=(2, 3, columns))
    tied = np.eye(rows, columns)[None]  # all singular values are the largest
    # Squares of 1e-25 are below float32's range, those of 1e25 above it.
    w_EDF = np.concatenate([random, low_rank, tied, 1e-25 * tied, 1e25 * tied, 0 * tied])
    found_E = largest_singular_value(jnp.asarray(w_EDF, jnp.float32))
    # After 10 squarings sigma_max is known to log(min(D, F)) / 2,048, which is 2e-3 at most; no number is near 0.
    converged = np.log(min(rows, columns)) / 2**11
    np.testing.assert_allclose(found_E, np.linalg.svd(w_EDF, compute_uv=False)[:, 0], rtol=converged)
    assert found_E[-1] == 0


def test_alignment_by_hand():
    # r @ diag(3, 4), sigma_max 4: of (1, 1), |(3, 4)| / (sqrt(2) 4) = 5 / (4 sqrt(2)); of (0, 2), 8 / (2 * 4) = 1;
    # of (-1, 0), 3 / 4. A zero row and a zero gate have 0.
    router_ED = jnp.array([[1.0, 1.0], [0.0, 2.0], [-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    gates_EDF = jnp.stack([jnp.diag(jnp.array([3.0, 4.0]))] * 4 + [jnp.zeros((2, 2))])
    expected_E = [5 / (4 * 2**0.5), 1, 3 / 4, 0, 0]
    assert_close(alignment(router_ED[None], gates_EDF[None]), [expected_E], terms=8)
    # It has no scale, and layers are their own.
    layers = jnp.stack([1e-12 * router_ED, router_ED[:, ::-1]]), jnp.stack([1e12 * gates_EDF, gates_EDF])
    found_LE = alignment(*layers)
    assert_close(found_LE[0], expected_E, terms=8)
    assert_close(found_LE[1], [5 / (4 * 2**0.5), 3 / 4, 1, 0, 0], terms=8)


@pytest.mark.parametrize("width, hidden", [(16, 8), (8, 16)])
def test_over_a_mesh_it_is_the_same_and_gathers_one_layer_at_a_time(width, hidden):
    rng, mesh = np.random.default_rng(0), sharding.make_mesh(2, 4)
    router_LED = rng.normal(size=(3, 8, width)).astype(np.float32)
    w_gate_LEDF = rng.normal(size=(3, 8, width, hidden)).astype(np.float32)
    placed = (
        jax.device_put(router_LED, NamedSharding(mesh, P())),
        jax.device_put(w_gate_LEDF, NamedSharding(mesh, GATE)),
    )
    program = jax.jit(lambda *arrays: alignment(*arrays, mesh)).lower(*placed).compile()
    # Sums over D and F of the response and of the Gram matrix, whose powers converge to what it is for both.
    assert_close(program(*placed), alignment(router_LED, w_gate_LEDF), terms=10 * (width + hidden))
    gathers = [one for one in costs.cost(program.as_text()).collectives if one.kind == "all-gather"]
    # a device's 8 / 4 experts of a layer, whole along F, as float32; once a layer
    assert [(one.bytes, one.group, one.times) for one in gathers] == [(2 * width * hidden * 4, 2, 3)]
