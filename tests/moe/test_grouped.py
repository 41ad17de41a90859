"""Chunks of rows: their bounds, and the layer's program for a TPU, compiled without one."""

import importlib.util
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from benchmarks.compiled import chips, costs, hlo
from moe_erc import sharding
from moe_erc.moe import grouped
from moe_erc.moe.experts import GATED, IMPLEMENTATIONS, weighed
from tests.tolerance import assert_close

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


def test_places_by_hand(monkeypatch):
    # A chunk has at most 4 rows of 3 floats, so 10 assignments are three chunks. Two of the
    # assignments belong to no expert.
    monkeypatch.setattr(grouped, "CHUNK_BYTES", 4 * 3 * 4)
    matrices = {"w_down": jnp.zeros((2, 3, 2))}
    experts_NK = jnp.array([[1, 0], [0, 2], [0, 1], [-1, 0], [1, 0]])
    plan = grouped._plan(jnp.zeros((5, 2)), experts_NK, matrices)
    np.testing.assert_array_equal(plan.rows_CR, [[1, 2, 4, 7], [9, 0, 5, 8], [10, 10, 10, 10]])
    np.testing.assert_array_equal(plan.sizes_CE, [[4, 0], [1, 3], [0, 0]])
    np.testing.assert_array_equal(plan.places_NK, [[5, 0], [1, 12], [2, 6], [12, 3], [7, 4]])


def test_several_chunks_are_of_whole_tiles(monkeypatch):
    monkeypatch.setattr(grouped, "CHUNK_BYTES", 1300 * 3 * 4)
    matrices = {"w_down": jnp.zeros((2, 3, 2))}
    for assignments, shape in ((1000, (1, 1000)), (3000, (3, 1024)), (4000, (4, 1024))):
        experts_NK = jnp.zeros((assignments, 1), jnp.int32)
        plan = grouped._plan(jnp.zeros((assignments, 2)), experts_NK, matrices)
        assert plan.rows_CR.shape == shape
        assert jnp.sum(plan.sizes_CE) == assignments


def test_chunks_on_a_tpu_are_a_part_of_its_memory():
    assert grouped.chunk_bytes() == grouped.CHUNK_BYTES
    # A v5p has 103 GB and two cores that compute as one device.
    chip = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=2, platform="tpu")
    mesh = sharding.make_mesh(1, 1).abstract_mesh.update(abstract_device=chip)
    with jax.sharding.use_abstract_mesh(mesh):
        assert grouped.chunk_bytes() == 103_000_000_000 // 32


def test_chunks_without_rows_are_not_computed(monkeypatch):
    monkeypatch.setattr(grouped, "CHUNK_BYTES", 4 * 2 * 4)
    calls = []

    def matmul(x_MD, w_EDF, sizes_E):
        jax.debug.callback(lambda sizes_E: calls.append(sizes_E.tolist()), sizes_E)
        return jnp.zeros((len(x_MD), w_EDF.shape[-1]))

    def expert(x, assigned, matrices, matmul):
        return matmul(x, matrices["w_down"]), ()

    experts_NK = jnp.array([[1], [-1], [5], [5]] + [[-1]] * 12)
    jax.block_until_ready(
        grouped.grouped(
            matmul, expert, jnp.ones((16, 2)), {}, experts_NK, {"w_down": jnp.ones((2, 2, 2))}
        )
    )
    jax.effects_barrier()
    assert calls == [[0, 1]]


@pytest.mark.parametrize("rows", [3, 8, 18, 1000])
def test_chunks_change_nothing(monkeypatch, rows):
    """Values and gradients, in any number of chunks, are those of every expert on every token."""
    monkeypatch.setattr(grouped, "CHUNK_BYTES", rows * 12 * 4)
    monkeypatch.setattr(grouped, "TILE", 4)
    rng = np.random.default_rng(0)
    weights_NK = rng.uniform(size=(20, 2)).astype(np.float32)
    experts_NK = rng.integers(-1, 6, size=(20, 2))  # some are nobody's, some another device's
    shapes = {"w_gate": (5, 8, 12), "w_up": (5, 8, 12), "w_down": (5, 12, 8)}
    matrices = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    inputs = rng.normal(size=(20, 8)).astype(np.float32), weights_NK, matrices
    of_results = [
        rng.normal(size=shape).astype(np.float32) for shape in ((20, 8), (20, 2, 12), (20, 2, 8))
    ]

    def loss(implementation, x_ND, weights_NK, matrices):
        expert = partial(weighed, keep=("hidden", "output"))
        y, kept = IMPLEMENTATIONS[implementation](
            expert, x_ND, {"weight": weights_NK}, experts_NK, matrices
        )
        return sum(
            jnp.vdot(*pair)
            for pair in zip((y, kept["hidden"], kept["output"]), of_results, strict=True)
        )

    inputs = jax.tree.map(jnp.asarray, inputs)
    experts_NK = jnp.asarray(experts_NK)
    found, right = (
        jax.value_and_grad(partial(loss, name), (0, 1, 2))(*inputs) for name in ("ragged", "dense")
    )
    assert_close(found, right, terms=8 + 12 + 8 + 40)


@pytest.mark.skipif(not HAS_LIBTPU, reason="compiles for TPU, which needs the extra `tpu`")
def test_a_layer_compiled_for_tpu_multiplies_what_it_must_and_expands_nothing():
    tokens, experts_per_token, experts, width, hidden = 1024, 4, 8, 512, 256
    # The rows are one chunk. A balanced expert has 512, which is one block of the weight gradient.
    rows = tokens * experts_per_token
    place = SingleDeviceSharding(chips.described("v5e:2x2", 1, None)[0][0])

    def shape(*of, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(of, dtype, sharding=place)

    def loss(x_ND, weights_NK, matrices, experts_NK):
        run = partial(IMPLEMENTATIONS["ragged"], weighed)
        return jnp.sum(
            run(x_ND, {"weight": weights_NK}, experts_NK, matrices)[0].astype(jnp.float32) ** 2
        )

    up, down = (experts, width, hidden), (experts, hidden, width)
    matrices = {name: shape(*of) for name, of in zip(GATED, (up, up, down), strict=True)}
    weights_NK, experts_NK = (
        shape(tokens, experts_per_token, dtype=of) for of in (jnp.float32, jnp.int32)
    )
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
    text = (
        gradients.lower(shape(tokens, width), weights_NK, matrices, experts_NK).compile().as_text()
    )
    cost, matmul = costs.cost(text), 2 * rows * width * hidden
    # Matmuls: 3 forward, 2 for the recomputed hidden rows, 3 for the gradients of rows. The 3 for
    # the gradients of matrices are open loops, of which one turn is counted.
    assert cost.grouped_flops == pytest.approx((3 + 2 + 3) * matmul, rel=0.1)
    assert cost.flops == pytest.approx(3 * matmul, rel=0.1) and len(cost.open_loops) == 3
    # XLA's own weight gradient masks the rows for every expert, which takes 8 x 4096 x 512 numbers.
    largest = max(math.prod(of.sizes) for line in text.splitlines() for of in hlo._shapes(line))
    assert largest == max(rows * width, experts * width * hidden)
