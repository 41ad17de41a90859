"""The limits of a machine: its matmul and copy rates, measured in turns with other subjects."""

import functools

from benchmarks import Subject, timed

MATMUL = 2048  # rows and columns: large enough for the full rate, short enough to take its turn
COPY = 2**25  # floats, beyond every cache


def build_matmul(dtype="float32"):
    """(run, facts) of a square matmul by XLA, on every core of one device."""
    import jax
    import jax.numpy as jnp

    a, b = jax.random.normal(jax.random.key(0), (2, MATMUL, MATMUL)).astype(dtype)
    multiply = jax.jit(functools.partial(jnp.matmul, precision="highest"))

    def step():
        multiply(a, b).block_until_ready()

    return timed(step), {}


def build_copy():
    """(run, facts) of reading an array and writing another."""
    import jax
    import jax.numpy as jnp

    array = jnp.ones(COPY)

    @jax.jit
    def copy(array):
        return array + 1

    def step():
        copy(array).block_until_ready()

    return timed(step), {}


def subjects():
    """The subjects of both rates, which take turns with others."""
    return {name: Subject(f"benchmarks.limits:build_{name}") for name in ("matmul", "copy")}


def rates(seconds):
    """{"flops_per_s", "bytes_per_s"} of the fastest turns."""
    return {
        "flops_per_s": 2 * MATMUL**3 / min(seconds["matmul"]),
        "bytes_per_s": 2 * 4 * COPY / min(seconds["copy"]),
    }


def least_seconds(flops, moved, best):
    """The time of computing or of moving bytes at the machine's rates, whichever is longer."""
    return max(flops / best["flops_per_s"], moved / best["bytes_per_s"])


def describe(best):
    """A line on the limits."""
    matmuls = f"{best['flops_per_s'] / 1e9:.0f} GFLOP/s in matmuls"
    copies = f"{best['bytes_per_s'] / 1e9:.1f} GB/s in copies"
    return f"limits: {matmuls}, {copies}"
