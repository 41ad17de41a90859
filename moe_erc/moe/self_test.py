"""Whether a grouped matmul is right on the device at hand, asked once at start-up: kernels differ by chip and driver.

Groups of many rows, of one and of none, then rows of no group, in bfloat16: the value and both
gradients must be those of a float32 loop but for rounding, and exactly zero where nothing is
multiplied.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

# A depth that no tile divides and a width that the widest of `pallas_matmul.py` divides.
SIZES = (150, 0, 1, 64)
BEHIND = 9
DEPTH = 96
WIDTH = 512
ROUNDING = 2**-6  # of the largest value; bfloat16 keeps 8 bits


@cache
def refusal(matmul: Callable, platform: str) -> str | None:
    """Why `matmul` is not to be used on this process's devices of `platform`; None if it may be.

    Where there is no such device, programs are compiled but not run, and nothing can be asked.
    """
    try:
        device = jax.local_devices(backend=platform)[0]
    except RuntimeError:
        return None
    # The first to ask is a model that is being traced; a thread of its own knows nothing of that.
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(_first_difference, matmul, device).result()
        except Exception as error:  # whatever a compiler may raise: a slower path exists
            return f"{type(error).__name__}: {error}".splitlines()[0]


def _first_difference(matmul, device):
    rng = np.random.default_rng(0)
    rows = sum(SIZES) + BEHIND
    groups = len(SIZES)
    shapes = (rows, DEPTH), (groups, DEPTH, WIDTH), (rows, WIDTH)
    x_MD, w_EDF, dy_MF = (rng.standard_normal(shape).astype(jnp.bfloat16) for shape in shapes)

    @jax.jit
    def results(x_MD, w_EDF, dy_MF, sizes_E):
        y_MF, pull_back = jax.vjp(lambda x_MD, w_EDF: matmul(x_MD, w_EDF, sizes_E), x_MD, w_EDF)
        return y_MF, *pull_back(dy_MF)

    found = results(*jax.device_put((x_MD, w_EDF, dy_MF, np.array(SIZES, np.int32)), device))
    expected = _by_loop(*(leaf.astype(np.float32) for leaf in (x_MD, w_EDF, dy_MF)))
    names = "value", "gradient of the rows", "gradient of the matrices"
    for name, leaf, right in zip(names, found, expected, strict=True):
        leaf = np.asarray(leaf, np.float32)
        # Not `>`: a NaN is a difference, too
        if not np.max(np.abs(leaf - right)) <= ROUNDING * np.max(np.abs(right)):
            return f"its {name} is wrong"
        if leaf[right == 0].any():
            return f"its {name} is not zero where nothing is multiplied"
    return None


def _by_loop(x_MD, w_EDF, dy_MF):
    y_MF = np.zeros_like(dy_MF)
    dx_MD = np.zeros_like(x_MD)
    dw_EDF = np.zeros_like(w_EDF)
    start = 0
    for group, size in enumerate(SIZES):
        own = slice(start, start + size)
        y_MF[own] = x_MD[own] @ w_EDF[group]
        dx_MD[own] = dy_MF[own] @ w_EDF[group].T
        dw_EDF[group] = x_MD[own].T @ dy_MF[own]
        start += size
    return y_MF, dx_MD, dw_EDF
