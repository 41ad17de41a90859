"""Whether a grouped matmul is right on the device at hand: kernels differ by chip and driver.

It is tested once, at start-up, in bfloat16, on groups of many rows, of one row and of none, with
rows of no group behind them. The value and both gradients must be those of a float32 loop but for
rounding. The gradient of an empty group's matrix must be exactly zero. What a matmul gives for rows
behind the last group is not read, so it may be anything.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

# No tile divides the depth; the widest tile of `pallas_matmul.py` divides the width.
SIZES = (150, 0, 1, 64)
BEHIND = 9
DEPTH = 96
WIDTH = 512
ROUNDING = 2**-6  # of the largest value; bfloat16 keeps 8 bits
UNTIMED = ("tpu",)  # platforms on which no kernel of ours has run
LOG = logging.getLogger(__name__)


@cache
def say_untimed(what: str, chosen: str, platform: str) -> None:
    """Says once in the log that "auto" took a kernel which no device of the platform has timed."""
    if platform in UNTIMED:
        LOG.warning("%s: %s is used on %s, where it has not been timed", what, chosen, platform)


@cache
def refusal(matmul: Callable, platform: str) -> str | None:
    """Why `matmul` must not be used on this process's devices of `platform`; None if it may be."""
    return ask(partial(_first_difference, matmul), platform)


def ask(test: Callable, platform: str) -> str | None:
    """What `test(device)` says of a device of this process: a line, or None if all is right.

    Where there is no such device, programs are compiled but not run, and nothing can be tested.
    """
    try:
        device = jax.local_devices(backend=platform)[0]
    except RuntimeError:
        return None
    # The first caller is a model that is being traced. In a thread of its own the test is not part
    # of that trace.
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(test, device).result()
        # Whatever a compiler raises, a slower path exists.
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]


def difference(names: Sequence[str], found: Sequence, expected: Sequence) -> str | None:
    """Which array differs from the expected one by more than the rounding of bfloat16."""
    for name, leaf, right in zip(names, found, expected, strict=True):
        leaf = np.asarray(leaf, np.float32)
        # `not … <=` rather than `>`: a NaN is a difference, too.
        if not np.max(np.abs(leaf - right)) <= ROUNDING * np.max(np.abs(right)):
            return f"its {name} is wrong"
    return None


def _first_difference(matmul, device):
    rng = np.random.default_rng(0)
    rows = sum(SIZES) + BEHIND
    groups = len(SIZES)
    x_MD = rng.standard_normal((rows, DEPTH)).astype(jnp.bfloat16)
    w_EDF = rng.standard_normal((groups, DEPTH, WIDTH)).astype(jnp.bfloat16)
    dy_MF = rng.standard_normal((rows, WIDTH)).astype(jnp.bfloat16)
    sizes_E = np.array(SIZES, np.int32)
    *inputs, dy, sizes = jax.device_put((x_MD, w_EDF, dy_MF, sizes_E), device)
    found = within_groups(value_and_gradients(matmul)(inputs, dy, sizes_E=sizes), sizes_E)
    expected = within_groups(by_loop(x_MD, w_EDF, dy_MF, sizes_E, np.float32), sizes_E)
    names = ("value", "gradient of the rows", "gradient of the matrices")
    refused = difference(names, found, expected)
    if not refused and np.asarray(found[-1], np.float32)[sizes_E == 0].any():
        refused = "its gradient of the matrices is not zero where a group is empty"
    return refused


def within_groups(results: Sequence, sizes_E: np.ndarray) -> tuple:
    """(y_MF, dx_MD, dw_EDF) without the rows behind the last group, which are unspecified."""
    y_MF, dx_MD, dw_EDF = results
    rows = sum(sizes_E)
    return y_MF[:rows], dx_MD[:rows], dw_EDF


def value_and_gradients(function: Callable) -> Callable:
    """The jitted function (inputs, gradient of the result, **fixed) -> (result, *of the inputs).

    fixed: the arguments of `function` that have no gradient, by keyword.
    """

    @jax.jit
    def run(inputs, of_result, **fixed):
        result, pull_back = jax.vjp(partial(function, **fixed), *inputs)
        return result, *pull_back(of_result.astype(result.dtype))

    return run


def by_loop(
    x_MD: np.ndarray, w_EDF: np.ndarray, dy_MF: np.ndarray, sizes_E: np.ndarray, dtype: type
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(y_MF, dx_MD, dw_EDF) as they must be, group by group on the host, in `dtype`."""
    x_MD = x_MD.astype(dtype)
    w_EDF = w_EDF.astype(dtype)
    dy_MF = dy_MF.astype(dtype)
    y_MF = np.zeros_like(dy_MF)
    dx_MD = np.zeros_like(x_MD)
    dw_EDF = np.zeros_like(w_EDF)
    start = 0
    for group, size in enumerate(sizes_E):
        own = slice(start, start + size)
        y_MF[own] = x_MD[own] @ w_EDF[group]
        dx_MD[own] = dy_MF[own] @ w_EDF[group].T
        dw_EDF[group] = x_MD[own].T @ dy_MF[own]
        start += size
    return y_MF, dx_MD, dw_EDF
