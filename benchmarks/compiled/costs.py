"""Costs of a compiled program for one device: matmul FLOPs, collectives, bytes.

They are read from its optimized HLO.

    cost(computation) = sum over its instructions
    cost(loop)        = trips x its body
    cost(conditional) = its dearest branch

`Compiled.cost_analysis` counts the body of a loop once, and so one layer of a scan over layers.
Elementwise work is not counted: memory bounds it, not FLOPs.
"""

import functools
import math
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.compiled import hlo

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
KERNELS = r'custom_call_target="[^"]*(?:tpu_custom_call|gemm|matmul|triton|mosaic|fmha)'


class Collective(NamedTuple):
    """One collective of the program, and how often it runs."""

    kind: str
    shapes: tuple[str, ...]  # of its results, the largest first
    bytes: int  # of one run: a device's operands or its results, whichever are more
    group: int  # devices that take part together
    asynchronous: bool  # other work may run meanwhile
    origin: str  # the traced operation behind it
    times: int = 1

    @property
    def wire_bytes(self) -> float:
        """The least that a device sends in all runs.

        An all-reduce is a reduce-scatter and an all-gather.
        """
        rounds = {"all-reduce": 2, "collective-permute": self.group / max(self.group - 1, 1)}.get(
            self.kind, 1
        )
        return self.times * self.bytes * rounds * (self.group - 1) / self.group


class Cost(NamedTuple):
    """Of one run on one device."""

    flops: int = 0  # matmuls and convolutions
    grouped_flops: int = 0  # ragged matmuls, as if every row belonged to one of the groups
    collectives: tuple[Collective, ...] = ()
    # origins of loops whose length depends on data: counted as one turn
    open_loops: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()  # origins of calls that may multiply matrices: not counted

    @property
    def wire_bytes(self) -> float:
        return sum(collective.wire_bytes for collective in self.collectives)


class Memory(NamedTuple):
    """Bytes of one device."""

    arguments: int
    outputs: int
    aliased: int  # outputs that are written over donated arguments
    temporaries: int
    program: int
    in_use: int  # at once, by the compiler's count; that of XLA:CPU leaves temporaries out

    @property
    def allocated(self) -> int:
        """All of it."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.program


def memory(compiled: jax.stages.Compiled) -> Memory:
    """What a `jax.stages.Compiled` says it needs."""
    stats = compiled.memory_analysis()
    return Memory(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.generated_code_size_in_bytes,
        stats.peak_memory_in_bytes,
    )


def cost(text: str) -> Cost:
    """Cost of a program, given as `Compiled.as_text()`."""
    found = _of_computation(hlo.parse(text))
    _of_computation.cache_clear()  # it holds the program
    return found


def _add(*costs):
    return Cost(*(sum(parts[1:], start=parts[0]) for parts in zip(Cost(), *costs, strict=True)))


@functools.cache
def _of_computation(computation):
    return _add(
        *(_of_instruction(instruction, computation) for instruction in computation.instructions)
    )


def _of_instruction(instruction, computation):
    inside = [_of_computation(called) for called in instruction.called]
    if instruction.opcode == "conditional":
        return max(
            inside, key=lambda branch: (branch.flops + branch.grouped_flops, branch.wire_bytes)
        )
    inside = _add(*inside)
    if instruction.opcode == "while":
        trips = hlo.trip_count(instruction)
        return (
            _add(inside, Cost(open_loops=(instruction.origin,)))
            if trips is None
            else _repeat(inside, trips)
        )
    if instruction.opcode == "async-start":
        inside = inside._replace(
            collectives=tuple(one._replace(asynchronous=True) for one in inside.collectives)
        )
    return _add(inside, _own_cost(instruction, computation))


def _repeat(once, trips):
    return once._replace(
        flops=trips * once.flops,
        grouped_flops=trips * once.grouped_flops,
        collectives=tuple(one._replace(times=trips * one.times) for one in once.collectives),
    )


def _own_cost(instruction, computation):
    if instruction.opcode.removesuffix("-start") in COLLECTIVES:
        return Cost(collectives=_collective(instruction, computation))
    if instruction.opcode == "dot":
        contracted = [
            instruction.operands[0].shapes[0].sizes[axis]
            for axis in instruction.numbers("lhs_contracting_dims")
        ]
        return Cost(flops=2 * math.prod(instruction.shapes[0].sizes) * math.prod(contracted))
    if instruction.opcode == "convolution":
        return Cost(flops=_convolution_flops(instruction))
    if instruction.opcode == "custom-call":
        return _kernel_cost(instruction)
    return Cost()


def _kernel_cost(instruction):
    """The cost of a call, of which no more than its name is known.

    Of libtpu's kernels behind `lax.ragged_dot` more is known.
    """
    if instruction.name.startswith("ragged-dot-none"):
        (result,) = instruction.shapes
        (rows,) = instruction.operands[-2].shapes
        return Cost(grouped_flops=2 * math.prod(result.sizes) * rows.sizes[1])
    multiplies = instruction.find(KERNELS) and not instruction.name.startswith(
        "ragged-dot-metadata"
    )
    return Cost(kernels=(instruction.origin or instruction.name,)) if multiplies else Cost()


def _collective(instruction, computation):
    """The collective that an instruction is, or ().

    A TPU runs some as a chain of fusions that repeat the instruction.
    """
    links = "".join(
        other.attributes for other in computation.instructions if other.opcode == "custom-call"
    )
    starts_chain = "AsyncCollectiveStart" in links
    if "async_collective_fusion_config" in instruction.attributes and not starts_chain:
        return ()
    kind = instruction.opcode.removesuffix("-start")
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # on TPU a fusion of the sum and of the slice that is kept
    operands = [shape for operand in instruction.operands for shape in operand.shapes]
    results = instruction.shapes
    # (operands, results, flags)
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        results = results[len(operands) : 2 * len(operands)]
    found = Collective(
        kind=kind,
        shapes=tuple(str(shape) for shape in sorted(results, key=lambda shape: -shape.bytes)),
        bytes=max(sum(shape.bytes for shape in shapes) for shapes in (operands, results)),
        group=hlo.group_size(instruction, computation.devices),
        asynchronous=instruction.opcode.endswith("-start") or starts_chain,
        origin=instruction.origin,
    )
    return (found,)


def _convolution_flops(instruction):
    """The number of pairs that meet.

    A TPU writes a batch axis of a dot as a window, dilated so that an element meets its own alone.
    """
    labels = instruction.find(r"dim_labels=(\w+)_(\w+)->(\w+)")[0]
    arrays = (
        *(operand.shapes[0].sizes for operand in instruction.operands),
        instruction.shapes[0].sizes,
    )
    image, kernel, result = (
        dict(zip(names, sizes, strict=True)) for names, sizes in zip(labels, arrays, strict=True)
    )
    windows = {axis: _window(instruction, int(axis)) for axis in image if axis.isdigit()}
    pairs = math.prod(
        _window_pairs(image[axis], result[axis], window) for axis, window in windows.items()
    )
    return 2 * result["b"] * result["f"] * kernel["i"] * pairs


def _window(instruction, axis):
    """(size, stride, low padding, dilation of the image, of the kernel) along one axis."""

    def field(name: str, default: int) -> int:
        found = instruction.find(rf"window=\{{[^}}]*\b{name}=([\dx_-]+)")
        return int(found[0].split("x")[axis].split("_")[0]) if found else default

    return (
        field("size", 1),
        field("stride", 1),
        field("pad", 0),
        field("lhs_dilate", 1),
        field("rhs_dilate", 1),
    )


def _window_pairs(image_size, result_size, window):
    size, stride, padding, image_dilation, kernel_dilation = window
    position = (
        np.arange(result_size)[:, None] * stride + np.arange(size) * kernel_dilation - padding
    )
    inside = (position >= 0) & (position <= (image_size - 1) * image_dilation)
    return int(np.sum(inside & (position % image_dilation == 0)))
