"""Compiles the train step for devices that are not there: does it fit, what does it compute and send, and ERC's share.

    python -m benchmarks.compile_ahead --config=configs/erc.py:15b --topology=v5p:4x4x4     needs the extra `tpu`
    python -m benchmarks.compile_ahead --config=configs/erc.py:debug --devices=cpu:8

No array is made. Figures are of one device and one optimizer step; FLOPs are matmuls alone, with loops multiplied out.
The losses on parameters (ERC) are compiled alone as well, values and gradients with every hinge active; --difference
also compiles the step without them. Exit code 1: it does not fit; 2: wrong input.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import environment
from benchmarks.compiled import buffers, chips, costs, report
from moe_erc import sharding
from moe_erc.launch import command_line
from moe_erc.losses import LOSSES
from moe_erc.losses.objective import Objective
from moe_erc.training.build import build
from moe_erc.training.state import shardings
from moe_erc.training.step import parameter_only

TOPOLOGY = flags.DEFINE_string("topology", None, "TPUs of a slice, generation:torus: v5p:4x4x4, v5e:16x16")
SLICES = flags.DEFINE_integer("slices", 1, "so many of them", lower_bound=1)
DEVICES = flags.DEFINE_string("devices", None, "virtual devices instead: cpu:64")
MEMORY = flags.DEFINE_float(
    "memory", None, "GiB that may be allocated on a device; the compiler's verdict alone counts if not given"
)
DIFFERENCE = flags.DEFINE_bool("difference", False, "compile the step without the losses on parameters, too")
LARGEST = 3  # temporaries that are named
JSON = flags.DEFINE_string("json", None, "write everything here, too")


class DoesNotFitError(Exception):
    """A device has less memory than the program needs."""


def main(_):
    config = flags.FLAGS.config
    with command_line.refusing_bad_input():
        devices, chip = chips.described(TOPOLOGY.value, SLICES.value, DEVICES.value)
        facts, programs = lower(config, devices)
        facts |= {"memory_bytes": chip.memory, "flops_per_s": chip.flops}
    try:
        measured = {name: compile_program(program) for name, program in programs.items()}
    except DoesNotFitError as error:
        remedies = (
            f"more devices than {len(devices)}, more train.micro_batches than {config.train.micro_batches}, "
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
    """(facts, {name: lowered program}): the step, its losses on parameters if it has any, the step without them."""
    training = build(config, devices)
    mesh = training.mesh
    model = training.model.config
    length = config.data.sequence_length
    batch_size = config.train.batch_size
    rows = functools.partial(jax.ShapeDtypeStruct, (batch_size, length), sharding=sharding.shard_batch(mesh))
    batch = {"inputs_BT": rows(jnp.int32), "targets_BT": rows(jnp.int32), "mask_BT": rows(bool)}
    if not config.data.attend_across_documents:
        batch["segments_BT"] = rows(jnp.int32)

    state = training.abstract_state
    programs = {"step": training.step.lower(state, batch)}
    without = Objective(batch_losses(config.losses.to_dict()), training.model)
    if training.objective != without:
        parameter_losses = functools.partial(parameter_only, training.objective)
        gradients = jax.jit(parameter_losses, out_shardings=(None, shardings(state.params)))
        programs["parameter losses"] = gradients.lower(state.params, state.rng, {})
        if DIFFERENCE.value:
            other = dataclasses.replace(training, objective=without)
            programs["step without them"] = other.step.lower(state, batch)
    tokens = batch_size * length / mesh.size
    facts = {
        "config": command_line.config_name(),
        "devices": f"{mesh.size} x {devices[0].device_kind}",
        "mesh": dict(mesh.shape),
        "parameters": model.parameters(),
        "tokens": tokens,  # of one device and step
        "micro_batches": training.micro_batches,
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


def compile_program(program):
    """{"seconds", "memory", "cost", "buffers"} of a lowered program, if it fits."""
    start = time.perf_counter()
    try:
        executable, account = buffers.compile_with_account(program)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(str(error).splitlines()[0]) from error
    seconds, memory = time.perf_counter() - start, costs.memory(executable)
    if MEMORY.value and memory.allocated > MEMORY.value * 2**30:
        raise DoesNotFitError(f"{memory.allocated / 2**30:.2f} GiB are allocated, a device has {MEMORY.value:g}")
    text = executable.as_text()
    largest = buffers.largest(account, text, LARGEST)
    return {"seconds": seconds, "memory": memory, "cost": costs.cost(text), "buffers": tuple(largest)}


def plain(value):
    """Named tuples as dictionaries, however deep."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


if __name__ == "__main__":
    command_line.run(main, default_config="configs/erc.py")
