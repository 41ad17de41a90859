"""Devices to compile for that need not be there: TPUs as libtpu describes them, or virtual CPUs."""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from moe_erc.checks import BadInput

CUBE = 4  # chips along each side of what v4 and v5p are joined of


class Chip(NamedTuple):
    """The limits of a device."""

    memory: float | None = None  # bytes that its compiler grants to a program
    flops: float | None = None  # per second in bfloat16, as published
    # With this option libtpu describes one device a chip, if that is not its default.
    config: str | None = None
    ring: int = 1  # a side of the torus is closed if this divides its length
    bandwidth: float | None = None  # bytes of memory per second, as published
    link: float | None = None  # bytes per second in one direction of a link, as published
    clock: float | None = None  # cycles per second: `flops` over what its matrix units do in one
    # Of the slice it is a part of: (length, whether it is closed) of every side. Of several slices
    # nothing is said.
    sides: tuple[tuple[int, bool], ...] = ()


CHIPS = {
    #           memory           flops   config     ring  bandwidth  link  clock
    "v4": Chip(30.75 * 2**30, 275e12, "megacore", CUBE, 1.2e12, 50e9, 1.05e9),
    "v5e": Chip(15.75 * 2**30, 197e12, None, 16, 0.82e12, 50e9, 1.5e9),
    "v5p": Chip(95.74 * 2**30, 459e12, None, CUBE, 2.77e12, 100e9, 1.75e9),
    "v6e": Chip(31.25 * 2**30, 918e12, None, 16, 1.64e12, 100e9, 1.75e9),
}

LIBTPU = {
    # Without it libtpu asks a metadata server about the machine, and prints long messages if there
    # is none.
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock is for chips, and none is used
}


def described(
    topology: str | None, slices: int, devices: str | None
) -> tuple[Sequence[jax.Device], Chip]:
    """(devices, chip) of a topology such as v5p:4x4x4, or of virtual devices such as cpu:64.

    It must be called before anything else uses a device.
    """
    if bool(topology) == bool(devices):
        raise BadInput("give one of --topology=v5p:4x4x4 and --devices=cpu:64")
    jax.config.update("jax_platforms", "cpu")  # devices of this machine are not used
    return _tpus(topology, slices) if topology else (_virtual(devices), Chip())


def _tpus(topology, slices):
    chip = CHIPS.get(topology.partition(":")[0])
    if chip is None:
        raise BadInput(
            f"--topology: {topology!r} does not begin with one of {', '.join(CHIPS)}; "
            "v5p:4x4x4 would do"
        )
    if not importlib.util.find_spec("libtpu"):
        raise BadInput('--topology compiles with libtpu, which is missing; pip install -e ".[tpu]"')
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    sides = sides_of(topology)
    closed = [is_closed for _, is_closed in sides]
    # libtpu describes all sides as open if it is not told. It takes three of them.
    options = {"wrap": (*closed, *[False] * (3 - len(closed)))}
    if chip.config:
        options["chip_config_name"] = chip.config
    try:
        description = topologies.get_topology_desc(topology, "tpu", num_slices=slices, **options)
        return description.devices, chip._replace(sides=sides if slices == 1 else ())
    except jax.errors.JaxRuntimeError as error:
        raise BadInput(f"--topology: {topology!r}: {error}") from error


def sides_of(topology: str) -> tuple[tuple[int, bool], ...]:
    """(length, whether it is a ring) of every side of a slice such as v5p:4x4x4.

    A cube of 4 x 4 x 4 chips has the switches that close its sides, so v4 and v5p close all sides
    of a slice or none. v5e and v6e close a side of 16.
    """
    generation, _, lengths = topology.partition(":")
    ring = CHIPS[generation].ring
    lengths = [int(length) for length in re.findall(r"\d+", lengths)]
    closed = [length % ring == 0 for length in lengths]
    if ring == CUBE:
        closed = [len(lengths) == 3 and all(closed)] * len(lengths)
    return tuple(zip(lengths, closed, strict=True))


def _virtual(devices):
    count = re.fullmatch(r"cpu:([1-9]\d*)", devices)
    if not count:
        raise BadInput(f"--devices: {devices!r} is not of the form cpu:64")
    jax.config.update("jax_num_cpu_devices", int(count[1]))
    return jax.devices()
