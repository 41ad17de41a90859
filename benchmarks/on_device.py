"""What only an accelerator can tell, one stage at a time, the most telling first.

    bash benchmarks/on_device.sh [--size=debug] [--output=DIR] [STAGE …]      stages in processes of their own
    python -m benchmarks.on_device STAGE [--size=debug] [--output=DIR]        one of them

- kernels: every grouped matmul and every attention against float64, forward and gradients. -
matmuls: their rates at the shapes of OLMoE-1B-7B and of the paper's 3B, by tile, beside a dense
matmul. - layer: the experts of one layer by implementation, sorting, gathering and summing
included. - step: tokens per second, share of the peak (MFU) and memory of whole optimizer steps,
ERC, vanilla and AoE. - profile: where the time of a step goes, by kernel. - peer: OLMoE of
`transformers` in PyTorch with the paper's pseudocode, the same shapes.

Each stage prints a table and appends one JSON line per row to OUTPUT/STAGE.jsonl as soon as it is
measured, so a stage that is cut off keeps what it has. `--size=debug` runs every stage on a CPU in
a minute; its times say nothing.
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
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 per second, as published

# (M, D, F, E) of a grouped matmul: K 8 of 16,384 tokens
MATMULS = {
    "full": {"olmoe_1b_7b": (131_072, 2048, 1024, 64), "3b": (131_072, 1536, 768, 64)},
    "debug": {"debug": (256, 64, 32, 8)},
}
# name, method, changes of the model's sizes, (sequences, length)
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
# rows and columns of a tile, bytes of a row of an operand multiplied at a time, warps, pipeline
# stages
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
    """Rows of a stage: printed and written one by one."""

    def __init__(self, output: pathlib.Path, stage: str):
        output.mkdir(parents=True, exist_ok=True)
        self._path = output / f"{stage}.jsonl"
        self.add(**environment(), devices=[device.device_kind for device in jax.devices()])

    def add(self, **row):
        """Prints a row and appends it."""
        print("  ".join(f"{key}={_short(value)}" for key, value in row.items()), flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def seconds(run, repeats: int = 10, rounds: int = 3) -> float:
    """Median over rounds of the mean time of a call.

    Calls of a round are queued and waited for together.
    """
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
    """Correctness on this device: relative errors against float64, by norm and by the largest element."""
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
        shapes = (M, D), (E, D, F), (M, F)
        x, w, dy = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
        right = _grouped_in_float64(x, w, dy, sizes_E)
        for name, matmul in experts.MATMULS.items():
            try:
                found = _value_and_gradients(matmul)(*map(jnp.asarray, (x, w, dy, sizes_E)))
                errors = dict(
                    zip(("value", "dx", "dw"), map(_relative_error, found, right), strict=True)
                )
            except Exception as error:  # what a compiler raises is what this stage is to show
                errors = {"failed": f"{type(error).__name__}: {error}"[:300]}
            rows.add(
                check="grouped matmul", implementation=name, dtype=jnp.dtype(dtype).name, **errors
            )


def _value_and_gradients(matmul):
    @jax.jit
    def run(x_MD, w_EDF, dy_MF, sizes_E):
        y_MF, pull_back = jax.vjp(lambda x_MD, w_EDF: matmul(x_MD, w_EDF, sizes_E), x_MD, w_EDF)
        return y_MF, *pull_back(dy_MF)

    return run


def _grouped_in_float64(x, w, dy, sizes_E):
    x, w, dy = (leaf.astype(np.float64) for leaf in (x, w, dy))
    y = np.zeros_like(dy)
    dx = np.zeros_like(x)
    dw = np.zeros_like(w)
    start = 0
    for expert, size in enumerate(sizes_E):
        own = slice(start, start + size)
        y[own] = x[own] @ w[expert]
        dx[own] = dy[own] @ w[expert].T
        dw[expert] = x[own].T @ dy[own]
        start += size
    return y, dx, dw


def _relative_error(found, right):
    found = np.asarray(found, np.float64)
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


def _check_attention(rows, size):
    from moe_erc.model import attention

    B, T, H, G, D = (2, 512, 16, 4, 128) if size == "full" else (2, 64, 2, 1, 16)
    keys = jax.random.split(jax.random.key(0), 4)
    of_float32 = [
        jax.random.normal(key, (B, T, heads, D))
        for key, heads in zip(keys, (H, G, G, H), strict=True)
    ]
    segments_BT = jnp.asarray(np.sort(np.random.default_rng(2).integers(5, size=(B, T)), axis=1))

    def value_and_gradients(attend, segments, of):
        def run(query, key, value, dy):
            y, pull_back = jax.vjp(lambda *of: attend(*of, segments_BT=segments), query, key, value)
            return y, *pull_back(dy)

        return jax.jit(run)(*of)

    for segments in (None, segments_BT):
        with jax.default_matmul_precision("highest"):
            right = value_and_gradients(attention.attend, segments, of_float32)
        half = [leaf.astype(jnp.bfloat16) for leaf in of_float32]
        for name in ("attend", "attend_by_cudnn"):
            try:
                found = value_and_gradients(getattr(attention, name), segments, half)
                errors = dict(
                    zip(
                        ("value", "dq", "dk", "dv"),
                        map(_relative_error, found, map(np.asarray, right)),
                        strict=True,
                    )
                )
            except Exception as error:
                errors = {"failed": f"{type(error).__name__}: {error}"[:300]}
            rows.add(
                check="attention", implementation=name, segments=segments is not None, **errors
            )


def matmuls(rows: Rows, size: str):
    """Rates of grouped matmuls: value, gradient of the rows, gradient of the matrices."""
    from moe_erc.moe import experts

    n = 8192 if size == "full" else 256
    a, b = jax.random.normal(jax.random.key(0), (2, n, n), jnp.bfloat16)
    dense = jax.jit(jnp.matmul)
    rows.add(dense=n, tflops=2e-12 * n**3 / seconds(lambda: dense(a, b)))
    copied = jnp.ones(2**28 if size == "full" else 2**16, jnp.float32)
    add_one = jax.jit(lambda leaf: leaf + 1)
    rows.add(
        copy_bytes=copied.nbytes, tb_per_s=2e-12 * copied.nbytes / seconds(lambda: add_one(copied))
    )
    for shape, (M, D, F, E) in MATMULS[size].items():
        operands = _operands(M, D, F, E)
        candidates = {}
        for tile in TILES[size]:
            candidates["pallas", tile] = _lowered_with_tile(tile, operands)
        for name in ("tokamax",):
            candidates[name, None] = _lowered(experts.MATMULS[name], operands)
        _time_all(rows, shape, 2 * M * D * F, candidates, operands)


def _operands(M, D, F, E):
    rng = np.random.default_rng(0)
    sizes_E = rng.multinomial(M, rng.dirichlet(np.full(E, 20.0))).astype(
        np.int32
    )  # as a trained router: within 2 x
    keys = jax.random.split(jax.random.key(1), 3)
    x, w, dy = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, ((M, D), (E, D, F), (M, F)), strict=True)
    )
    return x, w, dy, jnp.asarray(sizes_E)


def _lowered(matmul, operands):
    """{"value", "dx", "dw": what is lowered, or the error}."""

    def dx(x, w, dy, sizes_E):
        return jax.vjp(lambda x: matmul(x, w, sizes_E), x)[1](dy)

    def dw(x, w, dy, sizes_E):
        return jax.vjp(lambda w: matmul(x, w, sizes_E), w)[1](dy)

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
    """The matmul as a new function: a trace that was kept with other tiles does not serve."""
    return lambda x, w, sizes_E: kernels.pallas_matmul(x, w, sizes_E)


def _time_all(rows, shape, flops, candidates, operands):
    """Compiles side by side, then measures one by one."""

    def compiled(lowered):
        try:
            return lowered.compile() if not isinstance(lowered, Exception) else lowered
        except Exception as error:
            return error

    names = [(name, part) for name, parts in candidates.items() for part in parts]
    with ThreadPoolExecutor(8) as pool:
        programs = list(pool.map(lambda name: compiled(candidates[name[0]][name[1]]), names))
    for (name, part), program in zip(names, programs, strict=True):
        row = {"shape": shape, "implementation": name[0], "tile": name[1], "part": part}
        try:
            if isinstance(program, Exception):
                raise program
            row["tflops"] = 1e-12 * flops / seconds(functools.partial(program, *operands))
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:200]
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
                    row["failed"] = f"{type(error).__name__}: {error}"[:200]
                rows.add(**row)


def step(rows: Rows, size: str, only: str = ""):
    """Whole optimizer steps of configs; the peer's shapes are these."""
    from benchmarks import ours

    changes = {"dtype": "bfloat16", "remat": "block"}
    for name, method, resized, (batch_size, length) in STEPS[size]:
        if only and f"{name}-{method}" not in only.split(","):
            continue
        row = {"config": name, "method": method, **resized, "batch": batch_size, "length": length}
        try:
            run, facts = ours.build(method, _model(name, resized), batch_size, length, changes)
            row |= {
                key: facts[key]
                for key in ("compile_s", "parameters", "active_parameters", "temp_bytes")
            }
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
            row["failed"] = f"{type(error).__name__}: {error}"[:400]
        rows.add(**row)
        run = None  # its state leaves the device


def profile(rows: Rows, size: str, only: str = ""):
    """Where the time of a step goes: microseconds per step by kernel, and by the operation it belongs to."""
    from benchmarks import ours

    for name, method, resized, (batch_size, length) in STEPS[size]:
        if f"{name}-{method}" not in (only or "3b-vanilla,debug-erc").split(","):
            continue
        changes = {"dtype": "bfloat16", "remat": "block"}
        compiled, state, batch, _ = ours.compile_step(
            method, _model(name, resized), batch_size, length, changes
        )
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
        for plane in planes:
            if not plane.name.startswith("/device:"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    operation = str(dict(event.stats).get("hlo_op", event.name))
                    kernels[event.name, operations.get(operation, operation)] += (
                        event.duration_ns / PROFILED
                    )
        rows.add(config=name, method=method, step_s=taken, busy_s=1e-9 * sum(kernels.values()))
        for (kernel, operation), nanoseconds in kernels.most_common(60):
            rows.add(us=nanoseconds / 1e3, kernel=kernel[:80], operation=operation[-160:])


def _model(name, resized):
    return dict(zip(sizes.MODEL_FIELDS, sizes.MODELS[name], strict=True)) | resized


def _peak():
    kind = jax.devices()[0].device_kind
    return next((flops for chip, flops in PEAKS.items() if chip in kind), float("nan"))


def _peak_memory():
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0) / 2**30


def peer(rows: Rows, size: str):
    """PyTorch's OLMoE on the same device, bfloat16 throughout, a checkpoint per layer, as fused as it comes."""
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
                row["failed"] = f"{type(error).__name__}: {error}"[:400]
            rows.add(**row)
            run = None
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
    absl.flags.FLAGS.mark_as_parsed()  # tokamax reads them, and would parse the command line itself
    jax.config.update("jax_num_cpu_devices", 1)  # of no effect beside an accelerator
    start = time.perf_counter()
    rows = Rows(flags.output, flags.stage)
    options = {"only": flags.only} if flags.only else {}
    STAGES[flags.stage](rows, flags.size, **options)
    print(f"{flags.stage}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
