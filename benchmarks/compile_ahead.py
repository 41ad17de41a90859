"""Compiles the train step for devices that need not be there: memory, FLOPs, bytes, ERC's share.

    python -m benchmarks.compile_ahead --config=configs/erc.py:15b --topology=v5p:4x4x4
    python -m benchmarks.compile_ahead --config=configs/erc.py:debug --devices=cpu:8
    python -m benchmarks.compile_ahead --config=configs/erc.py:15b --topology=v5p:4x4x4 --search

--topology needs the extra `tpu`. No array is made. Figures are of one device and one optimizer
step. FLOPs are those of matmuls alone; a loop counts as often as it turns. The losses on parameters
(ERC) are compiled alone as well, values and gradients with every hinge active. --difference also
compiles the step without them. For one slice of TPUs the seconds are estimated
(`compiled/clock.py`); the estimate serves to compare programs and is no speed. --search compiles
the sensible meshes, numbers of micro-batches, and layers recomputed or not, and ranks them. Exit
code 1 says that the step does not fit, 2 that the input is bad.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import environment
from benchmarks.compiled import buffers, chips, clock, costs, report, search
from moe_erc import sharding
from moe_erc.checks import BadInput
from moe_erc.launch import command_line
from moe_erc.losses import LOSSES
from moe_erc.losses.objective import Objective
from moe_erc.training.build import build
from moe_erc.training.state import shardings
from moe_erc.training.step import parameter_only

SEARCHES = pathlib.Path("runs/searches")

TOPOLOGY = flags.DEFINE_string(
    "topology", None, "TPUs of a slice, generation:torus, as --topology=v5p:4x4x4 or v5e:16x16"
)
SLICES = flags.DEFINE_integer("slices", 1, "number of such slices, as --slices=2", lower_bound=1)
DEVICES = flags.DEFINE_string("devices", None, "virtual devices instead, as --devices=cpu:64")
MEMORY = flags.DEFINE_float(
    "memory",
    None,
    "GiB that may be allocated on a device; if not given, the compiler alone decides",
)
DIFFERENCE = flags.DEFINE_bool(
    "difference", False, "also compile the step without the losses on parameters"
)
LARGEST = 3  # temporaries that are named
PARAMETER_LOSSES = flags.DEFINE_bool(
    "parameter_losses", True, "also compile the losses on parameters alone"
)
SEARCH = flags.DEFINE_bool(
    "search", False, "compile the sensible cuts over the slice, and rank them by estimated time"
)
JSON = flags.DEFINE_string(
    "json",
    None,
    "also write everything to this file; --search keeps its results there, as JSON lines, and by "
    f"default in {SEARCHES}",
)


class DoesNotFitError(Exception):
    """A device has less memory than the program needs."""


def main(_):
    config = flags.FLAGS.config
    if SEARCH.value:
        with command_line.refusing_bad_input():
            search_cuts(config)
        return
    with command_line.refusing_bad_input():
        devices, chip = chips.described(TOPOLOGY.value, SLICES.value, DEVICES.value)
        facts, programs = lower(config, devices)
        facts |= {"memory_bytes": chip.memory, "flops_per_s": chip.flops}
    try:
        measured = compile_all(programs, facts, chip)
    except DoesNotFitError as error:
        remedies = (
            f"more devices than {len(devices)}, "
            f"more train.micro_batches than {config.train.micro_batches}, "
            f"or another mesh than {facts['mesh']}"
        )
        print(f"error: does not fit: {error}; use {remedies}", file=sys.stderr)
        sys.exit(1)
    report.show(facts, measured)
    if JSON.value:
        found = {
            "benchmark": "compile_ahead",
            "environment": environment(),
            "facts": facts,
            "programs": plain(measured),
        }
        pathlib.Path(JSON.value).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def lower(config, devices):
    """(facts, {name: lowered program}).

    The programs are the step, its losses on parameters if it has any, and the step without them.
    """
    training = build(config, devices)
    mesh = training.mesh
    model = training.model.config
    length = config.data.sequence_length
    batch_size = config.train.batch_size
    rows = functools.partial(
        jax.ShapeDtypeStruct, (batch_size, length), sharding=sharding.shard_batch(mesh)
    )
    batch = {"inputs_BT": rows(jnp.int32), "targets_BT": rows(jnp.int32), "mask_BT": rows(bool)}
    if not config.data.attend_across_documents:
        batch["segments_BT"] = rows(jnp.int32)

    state = training.abstract_state
    programs = {"step": training.step.lower(state, batch)}
    without = Objective(batch_losses(config.losses.to_dict()), training.model)
    if PARAMETER_LOSSES.value and training.objective != without:
        parameter_losses = functools.partial(parameter_only, training.objective)
        gradients = jax.jit(parameter_losses, out_shardings=(None, shardings(state.params)))
        programs["parameter losses"] = gradients.lower(state.params, state.rng, {})
        if DIFFERENCE.value:
            other = dataclasses.replace(training, objective=without)
            programs["step without them"] = other.step.lower(state, batch)
    tokens = batch_size * length / mesh.size
    group_rows = tokens * mesh.shape[sharding.EXPERT] * model.experts_per_token
    facts = {
        "config": command_line.config_name(),
        "devices": f"{mesh.size} x {devices[0].device_kind}",
        "mesh": dict(mesh.shape),
        "parameters": model.parameters(),
        "tokens": tokens,  # of one device and step
        "micro_batches": training.micro_batches,
        # of a micro-batch, at even routing
        "expert_rows": group_rows / training.micro_batches / model.experts,
        "model_flops": 3 * tokens * model.flops_per_token(length),
    }
    return facts, programs


def batch_losses(losses):
    """The losses without those on parameters."""
    kept = dict(losses)
    for name, block in losses.items():
        if LOSSES[name].kind == "parameters":
            kept[name] = block | {"weight": 0.0}
    return kept


def search_cuts(config):
    """Compile the cuts of a slice, each in a process of its own."""
    if not TOPOLOGY.value or SLICES.value > 1:
        raise BadInput(
            "--search ranks by an estimate for one slice of TPUs; give --topology=v5p:4x4x4 alone"
        )
    devices, _ = chips.described(TOPOLOGY.value, SLICES.value, DEVICES.value)
    name = f"{command_line.config_name()}-{TOPOLOGY.value.replace(':', '-')}.jsonl"
    path = pathlib.Path(JSON.value or SEARCHES / name)
    search.run(config, len(devices), [TOPOLOGY.value, MEMORY.value], path)


def compile_all(programs, facts, chip):
    """{name: what `compile_program` found}; the step has an estimate of its seconds."""
    estimate = None
    if chip.sides:
        estimate = functools.partial(clock.estimate, facts=facts, chip=chip)
    measured = {}
    for name, program in programs.items():
        measured[name] = compile_program(program, estimate if name == "step" else None)
    return measured


def compile_program(program, estimate: Callable | None = None):
    """What is found of a lowered program, if it fits.

    {"seconds" of compiling, "memory", "allocated", "cost", "sent", "estimate", "buffers"}

    estimate: (text, cost) -> `clock.Estimate`.
    """
    start = time.perf_counter()
    try:
        executable, account = buffers.compile_with_account(program)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(str(error).splitlines()[0]) from error
    seconds = time.perf_counter() - start
    memory = costs.memory(executable)
    if MEMORY.value and memory.allocated > MEMORY.value * 2**30:
        raise DoesNotFitError(
            f"{memory.allocated / 2**30:.2f} GiB are allocated, a device has {MEMORY.value:g}"
        )
    text = executable.as_text()
    largest = buffers.largest(account, text, LARGEST)
    cost = costs.cost(text)
    return {
        "seconds": seconds,
        "memory": memory,
        "allocated": memory.allocated,
        "cost": cost,
        "sent": cost.wire_bytes,
        "estimate": estimate(text, cost) if estimate else None,
        "buffers": tuple(largest),
    }


def plain(value):
    """A value in which named tuples, at any depth, are dictionaries."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


if __name__ == "__main__":
    command_line.run(main, default_config="configs/erc.py")
