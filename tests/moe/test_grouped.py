"""Chunks of rows: their bounds, and what a TPU is given of the layer, compiled without one."""

import importlib.util
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from benchmarks.compiled import chips, costs, hlo
from moe_erc.moe import grouped
from moe_erc.moe.experts import GATED, IMPLEMENTATIONS, weighed

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


def test_chunks_by_hand():
    # E D = 2 x 2 rows at most, so 10 assignments are three chunks of 4; two of them are nobody's
    matrices = {"w_down": jnp.zeros((2, 3, 2))}
    experts_NK = jnp.array([[1, 0], [0, 2], [0, 1], [-1, 0], [1, 0]])
    tokens_CR, rows_CR, sizes_CE = grouped._chunks(experts_NK, matrices)
    np.testing.assert_array_equal(rows_CR, [[1, 2, 4, 7], [9, 0, 5, 8], [10, 10, 10, 10]])
    np.testing.assert_array_equal(tokens_CR, [[0, 1, 2, 3], [4, 0, 2, 4], [5, 5, 5, 5]])
    np.testing.assert_array_equal(sizes_CE, [[4, 0], [1, 3], [0, 0]])


def test_chunks_without_rows_are_not_computed():
    calls = []

    def matmul(x_MD, w_EDF, sizes_E):
        jax.debug.callback(lambda sizes_E: calls.append(sizes_E.tolist()), sizes_E)
        return jnp.zeros((len(x_MD), w_EDF.shape[-1]))

    def expert(x, assigned, matrices, matmul):
        return matmul(x, matrices["w_down"]), ()

    experts_NK = jnp.array([[1], [-1], [5], [5]] + [[-1]] * 12)
    jax.block_until_ready(
        grouped.grouped(matmul, expert, jnp.ones((16, 2)), {}, experts_NK, {"w_down": jnp.ones((2, 2, 2))})
    )
    jax.effects_barrier()
    assert calls == [[0, 1]]


@pytest.mark.skipif(not HAS_LIBTPU, reason="compiles for TPU, which needs the extra `tpu`")
def test_a_layer_compiled_for_tpu_multiplies_what_it_must_and_expands_nothing():
    tokens, experts_per_token, experts, width, hidden = 1024, 4, 8, 512, 256
    rows = (
        tokens * experts_per_token
    )  # E D: one chunk; 512 an expert if balanced: one block of the weight gradient each
    place = SingleDeviceSharding(chips.described("v5e:2x2", 1, None)[0][0])

    def shape(*of, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(of, dtype, sharding=place)

    def loss(x_ND, weights_NK, matrices, experts_NK):
        run = partial(IMPLEMENTATIONS["ragged"], weighed)
        return jnp.sum(run(x_ND, {"weight": weights_NK}, experts_NK, matrices)[0].astype(jnp.float32) ** 2)

    up, down = (experts, width, hidden), (experts, hidden, width)
    matrices = {name: shape(*of) for name, of in zip(GATED, (up, up, down), strict=True)}
    weights_NK, experts_NK = (shape(tokens, experts_per_token, dtype=of) for of in (jnp.float32, jnp.int32))
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
    text = gradients.lower(shape(tokens, width), weights_NK, matrices, experts_NK).compile().as_text()
    cost, matmul = costs.cost(text), 2 * rows * width * hidden
    # Forward 3, the hidden rows again 2, gradients of the rows 3; of the matrices 3, an open loop counting one turn.
    assert cost.grouped_flops == pytest.approx((3 + 2 + 3) * matmul, rel=0.1)
    assert cost.flops == pytest.approx(3 * matmul, rel=0.1) and len(cost.open_loops) == 3
    # Under a mask for every expert, as XLA would have the weight gradient, there were 8 x 4096 x 512.
    largest = max(math.prod(of.sizes) for line in text.splitlines() for of in hlo._shapes(line))
    assert largest == max(rows * width, experts * width * hidden)
