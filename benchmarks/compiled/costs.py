"""Costs of a compiled program for one device: matmul FLOPs, collectives, bytes.

They are read from its optimized HLO.

    cost(computation) = sum over its instructions
    cost(loop)        = trips x its body
    cost(conditional) = its most expensive branch

`Compiled.cost_analysis` counts the body of a loop once: of a scan over layers it counts one layer.
Elementwise work is not counted, because its limit is memory and not FLOPs.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from benchmarks.compiled import hlo, kernels

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
# How libtpu notes the way of a collective through the torus, and over how many rings at once.
STRATEGY = r"(\w*Strategy\w*)\{colors:(\d+)"
Record = TypeVar("Record", bound=NamedTuple)


class Collective(NamedTuple):
    """One collective of the program, and how often it runs."""

    kind: str
    shapes: tuple[str, ...]  # of its results, the largest first
    bytes: int  # of one run: those of a device's operands or of its results, whichever are more
    group: int  # devices that take part together
    asynchronous: bool  # whether other work may run meanwhile
    origin: str  # the traced operation behind it
    times: int = 1
    links: int = 0  # of a TPU that it uses, if the compiler noted it

    @property
    def wire_bytes(self) -> float:
        """The smallest number of bytes that a device sends in all runs."""
        rounds = 1
        if self.kind == "all-reduce":
            rounds = 2  # it is a reduce-scatter and an all-gather
        elif self.kind == "collective-permute":
            rounds = self.group / max(self.group - 1, 1)  # a device sends all of its bytes
        return self.times * self.bytes * rounds * (self.group - 1) / self.group


class Cost(NamedTuple):
    """The cost of one run on one device."""

    flops: int = 0  # matmuls, convolutions, and kernels of attention
    grouped_flops: int = 0  # ragged matmuls, as if every row belonged to one of the groups
    collectives: tuple[Collective, ...] = ()
    # Origins of loops whose length depends on data; they are counted as one turn.
    open_loops: tuple[str, ...] = ()
    # Origins of calls that may multiply matrices; they are not counted.
    kernels: tuple[str, ...] = ()

    @property
    def wire_bytes(self) -> float:
        return sum(collective.wire_bytes for collective in self.collectives)


class Memory(NamedTuple):
    """The memory of a program on one device, in bytes."""

    arguments: int
    outputs: int
    aliased: int  # outputs that are written over donated arguments
    temporaries: int
    program: int
    in_use: int  # at once, as the compiler counts; XLA:CPU leaves temporaries out

    @property
    def allocated(self) -> int:
        """All memory that is allocated."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.program


def memory(compiled: jax.stages.Compiled) -> Memory:
    """The memory that a compiled program needs."""
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
    _of_computation.cache_clear()  # because the cache holds the program
    return found


def add_up(empty: Record, records: Iterable[Record]) -> Record:
    """The sum of named tuples, field by field, from `empty` on."""
    total = empty
    for record in records:
        total = total._make(mine + other for mine, other in zip(total, record, strict=True))
    return total


def _add(costs):
    return add_up(Cost(), costs)


@functools.cache
def _of_computation(computation):
    return _add(_of_instruction(inside, computation) for inside in computation.instructions)


def _of_instruction(instruction, computation):
    called = [_of_computation(computation) for computation in instruction.called]
    if instruction.opcode == "conditional":
        return max(called, key=_expense)
    inside = _add(called)
    if instruction.opcode == "while":
        trips = hlo.trip_count(instruction)
        if trips is None:
            return _add([inside, Cost(open_loops=(instruction.origin,))])
        return _repeat(inside, trips)
    if instruction.opcode == "async-start":
        collectives = tuple(one._replace(asynchronous=True) for one in inside.collectives)
        inside = inside._replace(collectives=collectives)
    return _add([inside, _own_cost(instruction, computation)])


def _expense(branch):
    """The key by which branches of a conditional are compared."""
    return branch.flops + branch.grouped_flops, branch.wire_bytes


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
        sizes = instruction.operands[0].shapes[0].sizes
        contracted = [sizes[axis] for axis in instruction.numbers("lhs_contracting_dims")]
        return Cost(flops=2 * math.prod(instruction.shapes[0].sizes) * math.prod(contracted))
    if instruction.opcode == "convolution":
        return Cost(flops=_convolution_flops(instruction))
    if instruction.opcode == "custom-call":
        return _kernel_cost(instruction)
    return Cost()


def _kernel_cost(instruction):
    """The cost of a call to a kernel; of one that nothing is known of, the name."""
    kernel = kernels.read(instruction)
    if kernel is None:
        return Cost()
    if kernel.kind == kernels.GROUPED:
        return Cost(grouped_flops=kernel.flops)
    if kernel.kind == kernels.ATTENTION:
        return Cost(flops=kernel.flops)
    return Cost(kernels=(instruction.origin or instruction.name,))


def _collective(instruction, computation):
    """(the collective of an instruction,), or () for a repetition.

    A TPU runs some collectives as a chain of fusions, each of which repeats the instruction. Only
    the start of a chain is counted.
    """
    links = "".join(
        other.attributes for other in computation.instructions if other.opcode == "custom-call"
    )
    is_chain_start = "AsyncCollectiveStart" in links
    if "async_collective_fusion_config" in instruction.attributes and not is_chain_start:
        return ()
    kind = instruction.opcode.removesuffix("-start")
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # on TPU a fusion of the sum and of the slice that is kept
    operands = []
    for operand in instruction.operands:
        operands += operand.shapes
    results = instruction.shapes
    # Their result is a tuple (operands, results, flags).
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        results = results[len(operands) : 2 * len(operands)]
    largest_first = sorted(results, key=lambda shape: shape.bytes, reverse=True)
    operand_bytes = sum(shape.bytes for shape in operands)
    result_bytes = sum(shape.bytes for shape in results)
    found = Collective(
        kind=kind,
        shapes=tuple(map(str, largest_first)),
        bytes=max(operand_bytes, result_bytes),
        group=hlo.group_size(instruction, computation.devices),
        asynchronous=instruction.opcode.endswith("-start") or is_chain_start,
        origin=instruction.origin,
        links=_noted_links(instruction),
    )
    return (found,)


def _noted_links(collective):
    """How many links of a TPU a collective uses, as libtpu noted; 0 if it did not."""
    for strategy, rings in collective.find(STRATEGY):
        directions = 1 if "UniDirection" in strategy else 2
        return directions * int(rings)
    return 0


def _convolution_flops(instruction):
    """FLOPs of a convolution, by the pairs of elements that are multiplied.

    A TPU writes a batch axis of a dot as a window that is dilated, so that an element of the image
    meets only its own element of the kernel.
    """
    labels = instruction.find(r"dim_labels=(\w+)_(\w+)->(\w+)")[0]
    arrays = (*instruction.operands, instruction)
    image, kernel, result = (
        dict(zip(names, array.shapes[0].sizes, strict=True))
        for names, array in zip(labels, arrays, strict=True)
    )
    pairs = 1
    for axis in image:
        if axis.isdigit():
            window = _window(instruction, int(axis))
            pairs *= _window_pairs(image[axis], result[axis], window)
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
    starts = np.arange(result_size)[:, None] * stride - padding
    position = starts + np.arange(size) * kernel_dilation
    inside = (position >= 0) & (position <= (image_size - 1) * image_dilation)
    return int(np.sum(inside & (position % image_dilation == 0)))
