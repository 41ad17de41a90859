"""Measurements that need an accelerator, in stages; the most important stage comes first.

    bash benchmarks/on_device.sh [--size=debug] [--output=DIR] [STAGE …]
    python -m benchmarks.on_device STAGE [--size=debug] [--output=DIR]

The first command runs stages in processes of their own, the second runs one stage.

- kernels: every grouped matmul and every attention against float64, forward and gradients.
- matmuls: rates of grouped matmuls at the shapes of OLMoE-1B-7B and of the paper's 3B, by tile,
  beside a dense matmul.
- layer: the experts of one layer by implementation, with sorting, gathering and summing.
- step: tokens per second, share of the peak (MFU) and memory of whole optimizer steps of ERC,
  vanilla and AoE.
- profile: the time of a step by kernel.
- peer: OLMoE of `transformers` in PyTorch with the paper's pseudocode, at the same shapes.

Each stage prints rows and appends one JSON line per row to OUTPUT/STAGE.jsonl as soon as the row is
measured, so that a stage that is cut off keeps its rows. `--size=debug` runs every stage on a CPU
in a minute; its times mean nothing.
"""

import argparse
import collections
import functools
import json
import pathlib
import re
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import absl.flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import environment
from configs import sizes

PROFILED = 3  # steps
CHANGES = {"model.dtype": "bfloat16", "model.remat": "block"}  # of the configs
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 per second, as published

# (M, D, F, E) of a grouped matmul: K is 8 for 16,384 tokens.
MATMULS = {
    "full": {"olmoe_1b_7b": (131_072, 2048, 1024, 64), "3b": (131_072, 1536, 768, 64)},
    "debug": {"debug": (256, 64, 32, 8)},
}
# Name of the sizes, method, changes of the sizes, (sequences, length).
STEPS = {
    "full": [
        ("3b", "erc", {}, (8, 4096)),
        ("3b", "vanilla", {}, (8, 4096)),
        ("olmoe_1b_7b", "erc", {"layers": 8}, (8, 4096)),
        ("3b", "aoe", {}, (8, 4096)),
        ("olmoe_1b_7b", "vanilla", {"layers": 8}, (8, 4096)),
    ],
    "debug": [("debug", "erc", {}, (2, 16)), ("debug", "vanilla", {"layers": 1}, (2, 16))],
}
# Rows and columns of a tile, bytes of an operand's row that are multiplied at a time, warps, and
# pipeline stages.
TILES = {
    "full": [
        (128, 128, 128, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 256, 128, 8, 2),
        (128, 256, 128, 8, 3),
        (128, 256, 128, 8, 4),
        (128, 256, 64, 8, 4),
        (256, 128, 128, 8, 3),
    ],
    "debug": [(128, 128, 128, 8, 3), (64, 64, 64, 4, 2)],
}


class Rows:
    """The rows of a stage, which are printed and written one by one."""

    def __init__(self, output: pathlib.Path, stage: str):
        output.mkdir(parents=True, exist_ok=True)
        self._path = output / f"{stage}.jsonl"
        self.add(**environment(), devices=[device.device_kind for device in jax.devices()])

    def add(self, **row):
        """Print a row and append it to the file."""
        print("  ".join(f"{key}={_short(value)}" for key, value in row.items()), flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def seconds(run, repeats: int = 10, rounds: int = 3) -> float:
    """Median over rounds of the mean time of a call; the calls of a round are queued together."""
    jax.block_until_ready(run())
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        results = [run() for _ in range(repeats)]
        jax.block_until_ready(results)
        found.append((time.perf_counter() - start) / repeats)
        del results
    return statistics.median(found)


def kernels(rows: Rows, size: str):
    """Correctness on this device: relative errors, by norm, against float64."""
    from moe_erc.moe import experts, self_test

    _check_attention(rows, size)
    platform = jax.default_backend()
    for name, matmul in experts.MATMULS.items():
        rows.add(
            check="self-test", implementation=name, refusal=self_test.refusal(matmul, platform)
        )
    M, D, F, E = (4096, 512, 384, 16) if size == "full" else (256, 64, 32, 4)
    rng = np.random.default_rng(1)
    sizes_E = rng.multinomial(M - 37, rng.dirichlet(np.full(E, 0.5))).astype(np.int32)
    sizes_E[E // 2] += sizes_E[1]
    sizes_E[1] = 0  # an empty expert
    for dtype in (jnp.bfloat16, jnp.float32):
        x = rng.standard_normal((M, D)).astype(dtype)
        w = rng.standard_normal((E, D, F)).astype(dtype)
        dy = rng.standard_normal((M, F)).astype(dtype)
        right = self_test.by_loop(x, w, dy, sizes_E, np.float64)
        right = self_test.within_groups(right, sizes_E)
        for name, matmul in experts.MATMULS.items():
            try:
                run = self_test.value_and_gradients(matmul)
                found = run((x, w), dy, sizes_E=sizes_E)
                found = self_test.within_groups(found, sizes_E)
                errors = _relative_errors(("value", "dx", "dw"), found, right)
            except Exception as error:  # this stage shows what a compiler raises
                errors = {"failed": _failure(error, 300)}
            rows.add(
                check="grouped matmul", implementation=name, dtype=jnp.dtype(dtype).name, **errors
            )


def _relative_errors(names, found, right):
    """{name: relative error by norm} of arrays."""
    errors = {}
    for name, array, right_array in zip(names, found, right, strict=True):
        difference = np.asarray(array, np.float64) - np.asarray(right_array)
        errors[name] = float(np.linalg.norm(difference) / np.linalg.norm(right_array))
    return errors


def _failure(error, length):
    """The beginning of an error, for a row."""
    return f"{type(error).__name__}: {error}"[:length]


def _check_attention(rows, size):
    from moe_erc.model import attention, splash
    from moe_erc.moe import self_test

    B, T, H, G, D = (2, 512, 16, 4, 128) if size == "full" else (2, 64, 2, 1, 16)
    keys = jax.random.split(jax.random.key(0), 4)
    of_float32 = []
    for key, heads in zip(keys, (H, G, G, H), strict=True):
        of_float32.append(jax.random.normal(key, (B, T, heads, D)))
    segments_BT = jnp.asarray(np.sort(np.random.default_rng(2).integers(5, size=(B, T)), axis=1))
    attends = {"attend": attention.attend}
    if jax.default_backend() == "tpu":
        attends["attend_by_splash"] = splash.attend_by_splash
    else:
        attends["attend_by_cudnn"] = attention.attend_by_cudnn

    def value_and_gradients(attend, segments, of):
        *inputs, dy = of
        return self_test.value_and_gradients(attend)(inputs, dy, segments_BT=segments)

    for segments in (None, segments_BT):
        with jax.default_matmul_precision("highest"):
            right = value_and_gradients(attention.attend, segments, of_float32)
        half = [leaf.astype(jnp.bfloat16) for leaf in of_float32]
        for name, attend in attends.items():
            try:
                found = value_and_gradients(attend, segments, half)
                errors = _relative_errors(("value", "dq", "dk", "dv"), found, right)
            except Exception as error:
                errors = {"failed": _failure(error, 300)}
            rows.add(
                check="attention", implementation=name, segments=segments is not None, **errors
            )


def matmuls(rows: Rows, size: str):
    """Rates of grouped matmuls: value, gradient of the rows, gradient of the matrices."""
    from moe_erc.moe import experts

    n = 8192 if size == "full" else 256
    a, b = jax.random.normal(jax.random.key(0), (2, n, n), jnp.bfloat16)
    dense = functools.partial(jax.jit(jnp.matmul), a, b)
    rows.add(dense=n, tflops=2e-12 * n**3 / seconds(dense))
    copied = jnp.ones(2**28 if size == "full" else 2**16, jnp.float32)
    copy = functools.partial(jax.jit(_add_one), copied)
    rows.add(copy_bytes=copied.nbytes, tb_per_s=2e-12 * copied.nbytes / seconds(copy))
    for shape, (M, D, F, E) in MATMULS[size].items():
        operands = _operands(M, D, F, E)
        candidates = {}
        for tile in TILES[size]:
            candidates["pallas", tile] = _lowered_with_tile(tile, operands)
        candidates["tokamax", None] = _lowered(experts.MATMULS["tokamax"], operands)
        _time_all(rows, shape, 2 * M * D * F, candidates, operands)


def _add_one(array):
    return array + 1


def _operands(M, D, F, E):
    rng = np.random.default_rng(0)
    # Loads differ by up to a factor of two, as those of a trained router.
    sizes_E = rng.multinomial(M, rng.dirichlet(np.full(E, 20.0))).astype(np.int32)
    x_key, w_key, dy_key = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(x_key, (M, D), jnp.bfloat16)
    w = jax.random.normal(w_key, (E, D, F), jnp.bfloat16)
    dy = jax.random.normal(dy_key, (M, F), jnp.bfloat16)
    return x, w, dy, jnp.asarray(sizes_E)


def _lowered(matmul, operands):
    """{"value", "dx" and "dw": the lowered program, or the error}."""

    def dx(x, w, dy, sizes_E):
        def of_rows(x):
            return matmul(x, w, sizes_E)

        _, pull_back = jax.vjp(of_rows, x)
        return pull_back(dy)

    def dw(x, w, dy, sizes_E):
        def of_matrices(w):
            return matmul(x, w, sizes_E)

        _, pull_back = jax.vjp(of_matrices, w)
        return pull_back(dy)

    def value(x, w, dy, sizes_E):
        return matmul(x, w, sizes_E)

    found = {}
    for name, function in {"value": value, "dx": dx, "dw": dw}.items():
        try:
            found[name] = jax.jit(function).lower(*operands)
        except Exception as error:
            found[name] = error
    return found


def _lowered_with_tile(tile, operands):
    from jax.experimental.pallas import triton

    from moe_erc.moe import pallas_matmul as kernels

    tile_rows, columns, depth_bytes, warps, stages = tile
    compiler = triton.CompilerParams(num_warps=warps, num_stages=stages)
    with mock.patch.multiple(
        kernels, ROWS=tile_rows, COLUMNS=(columns,), DEPTH_BYTES=depth_bytes, COMPILER=compiler
    ):
        return _lowered(_fresh(kernels), operands)


def _fresh(kernels):
    """The matmul as a new function, so that jax does not reuse a trace with other tiles."""

    def matmul(x, w, sizes_E):
        return kernels.pallas_matmul(x, w, sizes_E)

    return matmul


def _time_all(rows, shape, flops, candidates, operands):
    """Compile all candidates at the same time, then measure one after the other."""

    def compiled(lowered):
        if isinstance(lowered, Exception):
            return lowered
        try:
            return lowered.compile()
        except Exception as error:
            return error

    names = []
    lowered = []
    for (implementation, tile), parts in candidates.items():
        for part, program in parts.items():
            names.append((implementation, tile, part))
            lowered.append(program)
    with ThreadPoolExecutor(8) as pool:
        programs = list(pool.map(compiled, lowered))
    for (implementation, tile, part), program in zip(names, programs, strict=True):
        row = {"shape": shape, "implementation": implementation, "tile": tile, "part": part}
        try:
            if isinstance(program, Exception):
                raise program
            row["tflops"] = 1e-12 * flops / seconds(functools.partial(program, *operands))
        except Exception as error:
            row["failed"] = _failure(error, 200)
        rows.add(**row)


def layer(rows: Rows, size: str):
    """The experts of one layer: milliseconds and TFLOP/s, forward and with gradients."""
    from benchmarks import experts as benchmark

    for shape, (M, D, F, E) in MATMULS[size].items():
        tokens = M // benchmark.K
        for name in ("pallas", "tokamax", "block_loop"):
            for gradients in (False, True):
                row = {"shape": shape, "implementation": name, "gradients": gradients}
                try:
                    step, temporaries = benchmark.build(
                        name, "balanced", E, (tokens, D, F), gradients, dtype=jnp.bfloat16
                    )
                    taken = seconds(step, repeats=3)
                    flops = 6 * M * D * F * (3 if gradients else 1)
                    row |= {
                        "ms": 1e3 * taken,
                        "tflops": 1e-12 * flops / taken,
                        "temp_gb": 1e-9 * temporaries,
                    }
                except Exception as error:
                    row["failed"] = _failure(error, 200)
                rows.add(**row)


def step(rows: Rows, size: str, only: str = ""):
    """Whole optimizer steps of configs, at the shapes of the peer."""
    from benchmarks import ours

    for name, method, resized, (batch_size, length) in STEPS[size]:
        if only and f"{name}-{method}" not in only.split(","):
            continue
        row = {"config": name, "method": method, **resized, "batch": batch_size, "length": length}
        try:
            run, facts = ours.build(method, _model(name, resized), batch_size, length, CHANGES)
            for key in ("compile_s", "parameters", "active_parameters", "temp_bytes"):
                row[key] = facts[key]
            taken = run(7 if size == "full" else 2)[1:]
            median = statistics.median(taken)
            row |= {
                "step_s": median,
                "range": [min(taken), max(taken)],
                "tokens_per_s": batch_size * length / median,
            }
            row["mfu"] = facts["flops_per_token"] * row["tokens_per_s"] / _peak()
            row["peak_gib"] = _peak_memory()
        except Exception as error:
            row["failed"] = _failure(error, 400)
        rows.add(**row)
        run = None  # so that its state leaves the device


def profile(rows: Rows, size: str, only: str = ""):
    """The time of a step: microseconds by kernel and by the operation to which it belongs."""
    from benchmarks import ours

    for name, method, resized, (batch_size, length) in STEPS[size]:
        if f"{name}-{method}" not in (only or "3b-vanilla,debug-erc").split(","):
            continue
        model = _model(name, resized)
        compiled, state, batch, _ = ours.compile_step(method, model, batch_size, length, CHANGES)
        operations = dict(re.findall(r'%([\w.-]+) = .*?op_name="([^"]*)"', compiled.as_text()))
        with tempfile.TemporaryDirectory() as directory:
            state, _ = jax.block_until_ready(compiled(state, batch()))
            start = time.perf_counter()
            with jax.profiler.trace(directory):
                for _ in range(PROFILED):
                    state, _ = jax.block_until_ready(compiled(state, batch()))
            taken = (time.perf_counter() - start) / PROFILED
            (trace,) = pathlib.Path(directory).rglob("*.xplane.pb")
            planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        kernels = collections.Counter()
        for event in _events_of_devices(planes):
            operation = str(dict(event.stats).get("hlo_op", event.name))
            kernel = (event.name, operations.get(operation, operation))
            kernels[kernel] += event.duration_ns / PROFILED
        rows.add(config=name, method=method, step_s=taken, busy_s=1e-9 * sum(kernels.values()))
        for (kernel, operation), nanoseconds in kernels.most_common(60):
            rows.add(us=nanoseconds / 1e3, kernel=kernel[:80], operation=operation[-160:])


def _events_of_devices(planes):
    """The events in the streams of devices."""
    for plane in planes:
        if plane.name.startswith("/device:"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    yield from line.events


def _model(name, resized):
    return dict(zip(sizes.MODEL_FIELDS, sizes.MODELS[name], strict=True)) | resized


def _peak():
    kind = jax.devices()[0].device_kind
    return next((flops for chip, flops in PEAKS.items() if chip in kind), float("nan"))


def _peak_memory():
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0) / 2**30


def peer(rows: Rows, size: str):
    """PyTorch's OLMoE on the same device, all in bfloat16, with the layers recomputed."""
    import torch

    from benchmarks import peer as benchmark

    for name, method, resized, (batch_size, length) in STEPS[size]:
        if method != "erc":
            continue
        for trial in ("grouped_mm", "grouped_mm" + benchmark.COMPILED):
            row = {
                "config": name,
                **resized,
                "batch": batch_size,
                "length": length,
                "experts": trial,
            }
            try:
                run = benchmark.build_on_device(_model(name, resized), batch_size, length, trial)
                taken = run(5 if size == "full" else 2)[1:]
                median = statistics.median(taken)
                row |= {"step_s": median, "tokens_per_s": batch_size * length / median}
                if torch.cuda.is_available():
                    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            except Exception as error:
                row["failed"] = _failure(error, 400)
            rows.add(**row)
            run = None  # so that its state leaves the device
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


STAGES = {
    "kernels": kernels,
    "matmuls": matmuls,
    "layer": layer,
    "step": step,
    "profile": profile,
    "peer": peer,
}


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.on_device", description=__doc__.split("\n")[0]
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--size", choices=("full", "debug"), default="full")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("on_device"))
    parser.add_argument("--only", default="", help="stage step: as 3b-erc,3b-vanilla")
    flags = parser.parse_args()
    # tokamax reads flags of absl, and would otherwise parse the command line itself.
    absl.flags.FLAGS.mark_as_parsed()
    jax.config.update("jax_num_cpu_devices", 1)  # of no effect beside an accelerator
    start = time.perf_counter()
    rows = Rows(flags.output, flags.stage)
    options = {"only": flags.only} if flags.only else {}
    STAGES[flags.stage](rows, flags.size, **options)
    print(f"{flags.stage}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
