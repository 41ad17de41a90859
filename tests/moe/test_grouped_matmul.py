"""Groups of rows times their matrices, against a loop over the groups.

Covered are the forward pass and both gradients. Rows behind the last group reach none of them.
"""

import importlib.util
from functools import cache

import jax
import jax.numpy as jnp
import pytest
from absl import flags

from moe_erc.moe import grouped_matmul as by_library
from moe_erc.moe import megablox_matmul as by_megablox
from moe_erc.moe import pallas_matmul as by_kernel
from moe_erc.moe import self_test
from moe_erc.moe.experts import MATMULS
from tests.tolerance import assert_close

M, D, F = 49, 6, 21
SIZES = {
    "uneven": (0, 17, 3, 12, 1),
    "full": (8, 16, 24, 0, 1),
    "one group": (0, 0, 49, 0, 0),
    "single rows": (1, 1, 1, 1, 1),
    "none": (0, 0, 0, 0, 0),
}
NO_TOKAMAX = pytest.mark.skipif(
    not importlib.util.find_spec("tokamax"), reason="needs the extra `tokamax`"
)
EVERY_MATMUL = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=NO_TOKAMAX if name == "tokamax" else ()) for name in MATMULS]
)


@pytest.fixture
def small_tiles(monkeypatch):
    """Makes tiles small, so that groups have several blocks, whole and partial ones."""
    flags.FLAGS.mark_as_parsed()  # tokamax has flags, and would read pytest's command line
    monkeypatch.setattr(by_library, "BLOCK", 8)
    monkeypatch.setattr(by_kernel, "ROWS", 16)
    monkeypatch.setattr(by_kernel, "COLUMNS", (16,))
    monkeypatch.setattr(by_kernel, "DEPTH_BYTES", 16)
    monkeypatch.setattr(by_megablox, "ROWS", (16,))
    monkeypatch.setattr(by_megablox, "LANES", 4)
    monkeypatch.setattr(by_megablox, "TILE_BYTES", 1500)


def by_loop(x_MD, w_EDF, sizes):
    x_MD, w_EDF = x_MD.astype(jnp.float32), w_EDF.astype(jnp.float32)
    y_MF, start = jnp.zeros((M, F)), 0
    for size, w_DF in zip(sizes, w_EDF, strict=True):
        y_MF = y_MF.at[start : start + size].set(x_MD[start : start + size] @ w_DF)
        start += size
    return y_MF


@cache
def value_and_gradients(name):
    return self_test.value_and_gradients(MATMULS[name])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@EVERY_MATMUL
def test_values_and_gradients_are_those_of_a_loop(name, sizes, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (M, D), (len(sizes), D, F), (M, F)
    x_MD, w_EDF, dy_MF = (
        jax.random.normal(key, of).astype(dtype) for key, of in zip(keys, shapes, strict=True)
    )
    expected, pull_back = jax.vjp(lambda *of: by_loop(*of, sizes), x_MD, w_EDF)
    expected = expected, *pull_back(dy_MF.astype(jnp.float32))
    # The rows of other devices must not be read.
    rows = sum(sizes)
    behind = jnp.nan if name != "tokamax" else 0
    x_MD = x_MD.at[rows:].set(behind)
    dy_MF = dy_MF.at[rows:].set(behind)
    y_MF, dx_MD, dw_EDF = value_and_gradients(name)((x_MD, w_EDF), dy_MF, sizes_E=jnp.array(sizes))
    found = y_MF[:rows], dx_MD[:rows], dw_EDF
    expected = expected[0][:rows], expected[1][:rows], expected[2]
    # Sums over D, F or M are in float32. A bfloat16 result is rounded once, to its 8 bits.
    terms = D + F + M if dtype == jnp.float32 else 1
    for right, leaf in zip(expected, found, strict=True):
        assert leaf.dtype == dtype
        assert_close(leaf, right, terms)
    assert not dw_EDF[jnp.array(sizes) == 0].any()


@pytest.mark.parametrize("name", ["ragged", "megablox", "pallas"])
def test_rows_of_low_precision_are_summed_in_float32(name, monkeypatch):
    monkeypatch.setattr(by_library, "BLOCK", 64)  # as many rows as the kernel takes at a time
    # 127 blocks of 1 + 63 / 2^14 sum to 127.49. The 8 bits of bfloat16 would keep 1 of a block, and
    # 127 of the sum.
    x_MD = jnp.full((127, 64), 2**-14, jnp.bfloat16).at[:, 0].set(1).reshape(-1, 1)
    gradient = jax.grad(lambda w_EDF: jnp.sum(MATMULS[name](x_MD, w_EDF, jnp.array([len(x_MD)]))))
    assert gradient(jnp.ones((1, 1, 1), jnp.bfloat16)).item() == 127.5


def test_operands_of_two_dtypes_are_multiplied_in_the_wider():
    # bfloat16 does not hold 1 + 2^-12. The projection of a factorised gate is float32.
    x_MD, w_EDF = jnp.full((3, 1), 1 + 2**-12), jnp.ones((1, 1, 1), jnp.bfloat16)
    for name in ("ragged", "megablox", "pallas"):
        y_MF = MATMULS[name](x_MD, w_EDF, jnp.array([3]))
        assert y_MF.dtype == jnp.float32 and (y_MF == 1 + 2**-12).all(), name
