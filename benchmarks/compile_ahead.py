"""Compiles the train step for devices that are not there: does it fit, what does it compute and send, and ERC's share.

    python -m benchmarks.compile_ahead --config=configs/erc.py:15b --topology=v5p:4x4x4     needs the extra `tpu`
    python -m benchmarks.compile_ahead --config=configs/erc.py:debug --devices=cpu:8

No array is made. Figures are of one device and one optimizer step; FLOPs are matmuls alone, with loops multiplied out.
The losses on parameters (ERC) are compiled alone as well, values and gradients with every hinge active; --difference
also compiles the step without them. Exit code 1: it does not fit; 2: wrong input.
"""

import functools
import importlib.util
import json
import os
import pathlib
import re
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies

from benchmarks import compiled_report, environment
from moe_erc import command_line, sharding
from moe_erc.analysis import compiled
from moe_erc.losses.objective import PARAMETER_TERMS, Objective
from moe_erc.model.config import ModelConfig
from moe_erc.model.transformer import Transformer
from moe_erc.training.optimizer import OptimizerConfig, make_optimizer
from moe_erc.training.state import abstract_state, initializer, shardings
from moe_erc.training.step import make_train_step, parameter_only

TOPOLOGY = flags.DEFINE_string("topology", None, "TPUs of one slice, generation:torus: v5p:4x4x4, v5e:16x16")
DEVICES = flags.DEFINE_string("devices", None, "virtual devices instead: cpu:64")
MEMORY = flags.DEFINE_float("memory", None, "GiB of a device; what its compiler grants if not given")
DIFFERENCE = flags.DEFINE_bool("difference", False, "compile the step without the losses on parameters, too")
JSON = flags.DEFINE_string("json", None, "write everything here, too")


class Chip(NamedTuple):
    """What a device is held against."""

    bytes: float = float("inf")  # that its compiler grants to a program
    flops: float = float("nan")  # bfloat16 matmuls a second, as published
    config: str | None = None  # by which libtpu describes one device a chip, where that is not its default


CHIPS = {
    "v4": Chip(30.75 * 2**30, 275e12, "megacore"),
    "v5e": Chip(15.75 * 2**30, 197e12),
    "v5p": Chip(95.74 * 2**30, 459e12),
    "v6e": Chip(31.25 * 2**30, 918e12),
}


class DoesNotFitError(Exception):
    """A device has less memory than the program needs."""


def main(_):
    config = flags.FLAGS.config
    with command_line.refusing_bad_input():
        devices, chip = described_devices()
        facts, programs = lower(config, devices)
    try:
        compile_program = functools.partial(compile_within, chip.bytes)
        measured = {name: compile_program(program) for name, program in programs.items()}
    except DoesNotFitError as error:
        remedies = (
            f"more devices than {len(devices)}, more train.micro_batches than {config.train.micro_batches}, "
            f"or another mesh than {facts['mesh']}"
        )
        print(f"error: does not fit: {error}; use {remedies}", file=sys.stderr)
        sys.exit(1)
    compiled_report.show(facts | {"chip": chip._asdict()}, measured)
    if JSON.value:
        plain = {"benchmark": "compile_ahead", "environment": environment(), "facts": facts, "programs": measured}
        pathlib.Path(JSON.value).write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def described_devices():
    """(devices, chip) of --topology or --devices."""
    if bool(TOPOLOGY.value) == bool(DEVICES.value):
        raise ValueError("give one of --topology=v5p:4x4x4 and --devices=cpu:64")
    jax.config.update("jax_platforms", "cpu")  # what is attached is not asked
    chip = CHIPS[generation(TOPOLOGY.value)] if TOPOLOGY.value else Chip()
    chip = chip._replace(bytes=MEMORY.value * 2**30) if MEMORY.value else chip
    return described_tpus(chip) if TOPOLOGY.value else virtual_devices(), chip


def generation(topology):
    """The key of CHIPS."""
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise ValueError(f"--topology: {topology!r} does not begin with one of {', '.join(CHIPS)}; v5p:4x4x4 would do")
    return name


def described_tpus(chip):
    """Devices to compile for, from the description that libtpu has of them."""
    if not importlib.util.find_spec("libtpu"):
        raise ValueError('--topology compiles with libtpu, which is missing; pip install -e ".[tpu]"')
    # Without these libtpu asks a metadata server about the machine it is on, and says at length that there is none.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "none")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    options = {"chip_config_name": chip.config} if chip.config else {}
    try:
        return topologies.get_topology_desc(TOPOLOGY.value, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology: {TOPOLOGY.value!r}: {error}") from error


def virtual_devices():
    """So many CPU devices as --devices says."""
    if not (count := re.fullmatch(r"cpu:([1-9]\d*)", DEVICES.value)):
        raise ValueError(f"--devices: {DEVICES.value!r} is not of the form cpu:64")
    jax.config.update("jax_num_cpu_devices", int(count[1]))
    return jax.devices()


def lower(config, devices):
    """(facts, {name: lowered program}): the step, its losses on parameters if it has any, the step without them."""
    model = ModelConfig(**config.model)
    length, batch_size, micro_batches = config.data.sequence_length, config.train.batch_size, config.train.micro_batches
    mesh = make_mesh(config, devices)
    sharding.check(mesh, model, batch_size, micro_batches, config.eval.batch_size)
    network = Transformer(model, mesh)
    optimizer = make_optimizer(OptimizerConfig(**config.optimizer), config.train.steps)
    state = abstract_state(initializer(network, optimizer, config.seed), mesh)
    rows = functools.partial(jax.ShapeDtypeStruct, (batch_size, length), sharding=sharding.shard_batch(mesh))
    batch = {"inputs_BT": rows(jnp.int32), "targets_BT": rows(jnp.int32), "mask_BT": rows(bool)}

    def lower_step(objective):
        return make_train_step(network, objective, optimizer, micro_batches, shardings(state)).lower(state, batch)

    objective, objective_without = Objective(config.losses.to_dict()), Objective(batch_losses(config.losses))
    programs = {"step": lower_step(objective)}
    if objective != objective_without:
        gradients = jax.jit(functools.partial(parameter_only, objective), out_shardings=(None, shardings(state.params)))
        programs["parameter losses"] = gradients.lower(state.params, state.rng)
        if DIFFERENCE.value:
            programs["step without them"] = lower_step(objective_without)
    tokens = batch_size * length / mesh.size
    facts = {
        "config": command_line.config_name(),
        "devices": f"{mesh.size} x {devices[0].device_kind}",
        "mesh": dict(mesh.shape),
        "parameters": model.parameters(),
        "tokens": tokens,  # of one device and step
        "micro_batches": micro_batches,
        "model_flops": 3 * tokens * model.flops_per_token(length),
    }
    return facts, programs


def batch_losses(losses):
    """The losses without those on parameters."""
    return {
        name: options | {"weight": 0.0} if name in PARAMETER_TERMS else options
        for name, options in losses.to_dict().items()
    }


def make_mesh(config, devices):
    """`sharding.make_mesh`, where a torus that cannot be split so is wrong input."""
    try:
        return sharding.make_mesh(config.mesh.data, config.mesh.expert, devices)
    except NotImplementedError as error:
        raise ValueError(
            f"mesh.expert: {config.mesh.expert} devices are no product of sides of {TOPOLOGY.value}"
        ) from error


def compile_within(limit, program):
    """{"seconds", "memory", "cost"} of a lowered program, if it stays within `limit` bytes a device."""
    start = time.perf_counter()
    try:
        executable = program.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(str(error).splitlines()[0]) from error
    seconds, memory = time.perf_counter() - start, compiled.memory(executable)
    if memory.peak > limit:
        raise DoesNotFitError(f"{memory.peak / 2**30:.2f} GiB a device of {limit / 2**30:.2f}")
    return {"seconds": seconds, "memory": memory, "cost": compiled.cost(executable)}


if __name__ == "__main__":
    command_line.run(main, default_config="configs/erc.py")
