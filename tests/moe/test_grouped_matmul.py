"""Groups of rows and their matrices, against a loop over the groups; forward, both gradients, and what lies behind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.moe import grouped_matmul as module
from moe_erc.moe.grouped_matmul import grouped_matmul

M, D, F = 48, 6, 5
SIZES = {"uneven": (0, 17, 3, 12), "full": (8, 16, 24, 0), "one group": (0, 0, 48, 0), "none": (0, 0, 0, 0)}


def by_loop(x_MD, w_EDF, sizes):
    y_MF, start = jnp.zeros((M, F)), 0
    for size, w_DF in zip(sizes, w_EDF, strict=True):
        y_MF = y_MF.at[start : start + size].set(x_MD[start : start + size] @ w_DF)
        start += size
    return y_MF


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients_are_those_of_a_loop(sizes, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 8)  # so that groups have several blocks, whole and partial ones
    keys = jax.random.split(jax.random.key(0), 3)
    x_MD, w_EDF, dy_MF = (jax.random.normal(key, of) for key, of in zip(keys, ((M, D), (4, D, F), (M, F)), strict=True))
    expected, pull_back = jax.vjp(lambda x_MD, w_EDF: by_loop(x_MD, w_EDF, sizes), x_MD, w_EDF)
    behind = sum(sizes)
    x_MD = x_MD.at[behind:].set(jnp.nan)  # another device's rows are not looked at
    found, pull_back_found = jax.vjp(lambda x_MD, w_EDF: grouped_matmul(x_MD, w_EDF, jnp.array(sizes)), x_MD, w_EDF)
    for a, b in zip((expected, *pull_back(dy_MF)), (found, *pull_back_found(dy_MF)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)


def test_blocks_of_low_precision_are_summed_in_float32(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 1)
    # 1 + 300 / 512: a sum in bfloat16, of 8 bits, would stay at 1
    x_MD = jnp.full((301, 1), 1 / 512, jnp.bfloat16).at[0].set(1)
    gradient = jax.grad(lambda w_EDF: jnp.sum(grouped_matmul(x_MD, w_EDF, jnp.array([301]))))
    assert gradient(jnp.ones((1, 1, 1), jnp.bfloat16)).item() == pytest.approx(1 + 300 / 512, rel=2**-8)
