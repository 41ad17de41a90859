"""Seconds of a step, estimated from the program that libtpu has scheduled for one slice.

Nothing is run. The estimate serves to compare programs; it is no speed. Its parts:

    cycles        what libtpu itself estimates for fusions, copies and the like, over the clock rate
    kernels       FLOPs of the tiles that kernels compute, over an assumed share of the peak rate
    rows          gathers and scatters of rows, and sorts: bytes and comparisons, a guess
    collectives   bytes that a device sends, over an assumed share of the rate of the links used

Asynchronous collectives are told apart and taken to be hidden. Routing is taken to be even:

- a loop whose length depends on routing walks an expert's rows in blocks of `BLOCK`
- of chunks of rows, those that a device's own experts fill are computed, the others skipped
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.compiled import hlo, kernels
from benchmarks.compiled.chips import Chip
from benchmarks.compiled.costs import COLLECTIVES, Collective, Cost, add_up
from moe_erc.moe.grouped_matmul import BLOCK

CYCLES = r'"estimated_cycles":"(\d{1,18})"'  # 2^63 - 1, of 19 digits, says that it has none
GATHER_PASSES = 3  # in bfloat16 two rows share a row of a tile: both are read, one is written
SCATTER_PASSES = 6  # an update is read, its row is read and written, at half the rate of memory
SORT_LANES = 1024  # elements that a vector unit compares and exchanges in one instruction
SORT_CYCLES = 2  # of every array that is sorted along, and every stage of a bitonic sort
START = 2e-6  # seconds before the first byte of a collective


class Share(NamedTuple):
    """An assumed share of a published rate: the best, the likely and the worst case."""

    best: float
    likely: float
    worst: float


GROUPED = Share(0.85, 0.65, 0.5)
ATTENTION = Share(0.65, 0.5, 0.35)
LINK = Share(1.0, 0.9, 0.5)


class Seconds(NamedTuple):
    """A time in the best, the likely and the worst case."""

    best: float = 0
    likely: float = 0
    worst: float = 0


class Estimate(NamedTuple):
    """Seconds of one device and one step."""

    cycles: Seconds
    kernels: Seconds
    rows: Seconds
    collectives: Seconds  # nothing runs meanwhile
    asynchronous: Seconds  # collectives; not a part of the step
    step: Seconds
    unknown: int  # instructions and kernels that run in the step and have no estimate


class Work(NamedTuple):
    """What a device computes, by the source of its time."""

    cycles: float = 0
    grouped_flops: float = 0  # of rows of all groups, as if each belonged to one
    attention_flops: float = 0
    row_bytes: float = 0
    sort_cycles: float = 0
    unknown: float = 0


class _Surroundings(NamedTuple):
    """Where an instruction stands."""

    expert_axis: int
    expert_rows: float  # of an expert, at even routing
    turns: int = 1  # of the innermost loop
    chunks: int = 1  # into which the rows of the device's own experts are cut


def estimate(text: str, cost: Cost, facts: Mapping, chip: Chip) -> Estimate:
    """The estimate of a step.

    Args:
      text: its `Compiled.as_text()`.
      cost: what `costs.cost` read from it.
      facts: "mesh" and "expert_rows", the rows of an expert in a micro-batch at even routing.
      chip: a chip of the slice that the step was compiled for.
    """
    expert_axis = facts["mesh"]["expert"]
    found = work(text, expert_axis, facts["expert_rows"])
    # A kernel skips rows that belong to no group.
    grouped = _at(GROUPED, found.grouped_flops / expert_axis / chip.flops)
    kernel_seconds = _sum([grouped, _at(ATTENTION, found.attention_flops / chip.flops)])
    waited_for = [one for one in cost.collectives if not one.asynchronous]
    hidden = [one for one in cost.collectives if one.asynchronous]
    cycles = Seconds(*[found.cycles / chip.clock] * 3)
    rows = found.row_bytes / chip.bandwidth + found.sort_cycles / chip.clock
    parts = [cycles, kernel_seconds, Seconds(rows, rows, rows), _together(waited_for, chip)]
    return Estimate(*parts, _together(hidden, chip), _sum(parts), round(found.unknown))


def _at(share, seconds_at_peak):
    return Seconds(*[seconds_at_peak / part for part in share])


def _sum(parts):
    return add_up(Seconds(), parts)


def _together(collectives, chip):
    return _sum(collective_seconds(one, chip) for one in collectives)


def collective_seconds(collective: Collective, chip: Chip) -> Seconds:
    """Seconds of all runs of a collective within a slice."""
    links = collective.links or _assumed_links(collective, chip)
    at_peak = _at(LINK, collective.wire_bytes / (links * chip.link))
    return _sum([at_peak, Seconds(*[START * collective.times] * 3)])


def _assumed_links(collective, chip):
    """Links that a collective is taken to use whose way libtpu does not note.

    It runs along as many whole sides of the torus as its group covers, over two links of a closed
    side and one of an open side.
    """
    # On a ring of n a byte travels n / 4 links on average, so however large the group, each byte
    # that a device sends takes half a link's time.
    if "all-to-all" in collective.kind:
        return 2
    links = 0
    left = collective.group
    for side, is_closed in sorted(chip.sides):
        if side > 1 and left % side == 0:
            left //= side
            links += 2 if is_closed else 1
    return max(links, 1)


def work(text: str, expert_axis: int, expert_rows: float) -> Work:
    """What a device computes in a program, given as `Compiled.as_text()`."""
    return _of_computation(hlo.parse(text), _Surroundings(expert_axis, expert_rows))


def _of_computation(computation, around):
    return _add(_of_instruction(instruction, around) for instruction in computation.instructions)


def _add(works):
    return add_up(Work(), works)


def _times(work, factor):
    return Work(*[factor * value for value in work])


def _of_instruction(instruction, around):
    if instruction.opcode == "while":
        return _loop(instruction, around)
    if instruction.opcode == "conditional":
        return _conditional(instruction, around)
    # Rows are gathered by the SparseCores, which start them and are waited for. They are taken to
    # run alone: what they feed comes next.
    if instruction.opcode in ("call", "call-start", "async-start"):
        return _add(_of_computation(called, around) for called in instruction.called)
    if instruction.opcode == "custom-call":
        return _kernel(instruction)
    cycles = instruction.find(CYCLES)
    if cycles:
        return Work(cycles=int(cycles[0]))
    if instruction.opcode in ("gather", "scatter", "sort", "fusion"):
        return _rows(instruction)
    return Work()


def _loop(loop, around):
    turns = hlo.trip_count(loop)
    if turns is None:
        # Every chunk has a part of an expert's rows. On average half a block more is computed than
        # the expert has rows, once for all its chunks.
        turns = (around.expert_rows / BLOCK + 0.5) / around.chunks
    else:
        around = around._replace(turns=turns)
    return _times(_add(_of_computation(called, around) for called in loop.called), turns)


def _conditional(conditional, around):
    """The dearest branch; that of a chunk of rows, as often as a chunk is not empty."""
    filled = 1.0
    if "moe" in conditional.origin and around.turns > 1:
        chunks = math.ceil(around.turns / around.expert_axis)
        filled = chunks / around.turns
        around = around._replace(chunks=chunks)
    branches = [_of_computation(called, around) for called in conditional.called]
    branches.sort(key=_expense)
    average = _add([_times(branches[-1], filled), _times(branches[0], 1 - filled)])
    # FLOPs of kernels stay those of all rows; `estimate` divides them by the expert axis.
    return average._replace(grouped_flops=branches[-1].grouped_flops)


def _expense(work):
    return work.grouped_flops + work.attention_flops, work.cycles, work.row_bytes


def _kernel(call):
    kernel = kernels.read(call)
    if kernel is None:
        return Work()
    if kernel.kind == kernels.GROUPED:
        return Work(grouped_flops=kernel.tile_flops)
    if kernel.kind == kernels.ATTENTION:
        return Work(attention_flops=kernel.tile_flops)
    return Work(unknown=1)


def _rows(instruction):
    """The work of a gather, scatter or sort, alone or inside a fusion."""
    inside = [instruction, *_inside(instruction)]
    for one in inside:
        if one.opcode == "sort":
            return Work(sort_cycles=_sort_cycles(one))
        if one.opcode == "gather":
            return Work(row_bytes=GATHER_PASSES * _bytes(one))
        if one.opcode == "scatter":
            return Work(row_bytes=SCATTER_PASSES * _bytes(one.operands[-1]))
    opcodes = [one.opcode for one in inside]
    if any(opcode.removesuffix("-start") in COLLECTIVES for opcode in opcodes):
        return Work()  # `costs` counts it
    return Work(unknown=1)


def _inside(instruction):
    """All instructions that one calls, at any depth."""
    found = []
    for called in instruction.called:
        for one in called.instructions:
            found += [one, *_inside(one)]
    return found


def _bytes(instruction):
    return sum(shape.bytes for shape in instruction.shapes)


def _sort_cycles(sort):
    sizes = sort.shapes[0].sizes
    stages = math.log2(max(sizes[sort.numbers("dimensions")[0]], 2))
    stages = stages * (stages + 1) / 2
    vectors = math.prod(sizes) / SORT_LANES
    return vectors * len(sort.shapes) * stages * SORT_CYCLES
