"""XLA's HLO text as a graph: computations and their instructions.

An instruction is a line with its shapes, loops and groups:

    %name = f32[8,16]{1,0} opcode(%operand, …), attribute=value, …,
        metadata={op_name="where it comes from"}

Everything is defined before it is used, so one pass links operands to instructions and calls to
computations.
"""

import dataclasses
import math
import re
from typing import NamedTuple

HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
CALLS = re.compile(
    r"(?:calls|body|true_computation|false_computation)=%?([\w.-]+)|branch_computations=\{([^}]*)\}"
)
NAME = re.compile(r"[\w.-]+")
# Some kernels have an attribute of several lines. The end of a computation may look like one of
# them; no instruction is read from it.
CONTINUATION = re.compile(r'\n(?="|\}.)')


class Shape(NamedTuple):
    """Element type and sizes of an array."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        width = re.search(r"\d+", self.dtype)
        bits = int(width[0]) if width else 0  # a token has none
        if self.dtype == "pred":
            bits = 8
        return math.prod(self.sizes) * bits // 8

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.sizes))}]"


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a computation."""

    name: str
    shapes: tuple[Shape, ...]  # of the result; several for a tuple
    opcode: str
    operands: tuple["Instruction", ...]
    literal: str  # the text between the parentheses, for constants
    attributes: str
    # Without the condition of a loop, and without what a reduction does to every element.
    called: tuple["Computation", ...]
    condition: "Computation | None"

    @property
    def origin(self) -> str:
        """The traced operation, as jax names it."""
        return next(iter(self.find(r'op_name="([^"]*)"')), "")

    def find(self, pattern: str) -> list:
        """All matches in the attributes."""
        return re.findall(pattern, self.attributes)

    def numbers(self, attribute: str) -> list[int]:
        """The numbers of an attribute like lhs_contracting_dims={1,2}."""
        numbers = []
        for found in self.find(rf"\b{attribute}=\{{([\d,]*)\}}"):
            numbers += [int(number) for number in found.split(",") if number]
        return numbers


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """A named list of instructions."""

    name: str
    instructions: list[Instruction]
    devices: int  # of the program

    @property
    def root(self) -> Instruction:
        return self.instructions[-1]


def parse(text: str) -> Computation:
    """The entry computation of a program, whose instructions lead to all others."""
    partitions = re.search(r"num_partitions=(\d+)", text)
    devices = int(partitions[1]) if partitions else 1
    computations = {}
    scope = {}
    entry = None
    for line in CONTINUATION.sub(" ", text).splitlines():
        header = HEADER.match(line)
        match = INSTRUCTION.match(line)
        if header:
            scope = {}
            current = Computation(header[2], [], devices)
            computations[current.name] = current
            entry = current if header[1] else entry
        elif match:
            instruction = _instruction(match, scope, computations)
            scope[instruction.name] = instruction
            current.instructions.append(instruction)
    return entry


def _instruction(match, scope, computations):
    _, name, result, opcode, rest = match.groups()
    # Operands end at the first "), ". A constant or a parameter may have nothing behind its ")".
    end = ")" if opcode in ("constant", "parameter") else "), "
    literal, _, attributes = rest.partition(end)
    names = []
    for calls in CALLS.findall(attributes):
        names += NAME.findall(" ".join(calls))
    if opcode in ("call", "call-start"):
        names += re.findall(r"to_apply=%?([\w.-]+)", attributes)
    condition = re.search(r"condition=%?([\w.-]+)", attributes)
    return Instruction(
        name=name,
        shapes=_shapes(result),
        opcode=opcode,
        operands=tuple(scope[word] for word in NAME.findall(literal) if word in scope),
        literal=literal,
        attributes=attributes,
        called=tuple(computations[name] for name in names),
        condition=computations[condition[1]] if condition else None,
    )


def _shapes(text):
    shapes = []
    for dtype, sizes in SHAPE.findall(text):
        numbers = [int(size) for size in sizes.split(",") if size]
        shapes.append(Shape(dtype, tuple(numbers)))
    return tuple(shapes)


def origins(computation: Computation) -> dict[str, str]:
    """{name: origin} of every instruction of a program, at any depth."""
    found = {}
    for instruction in computation.instructions:
        found[instruction.name] = instruction.origin
        for called in instruction.called:
            found |= origins(called)
    return found


def trip_count(loop: Instruction) -> int | None:
    """How often a while loop turns; None if that depends on data.

    XLA may have noted it. If not, the loop is one of jax's if it has a counter that goes up by one
    to a constant.
    """
    known = loop.find(r'known_trip_count":\{"n":"(\d+)"')
    if known:
        return int(known[0])
    test = loop.condition.root
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, limit = test.operands
    start = loop.operands[0].operands[int(counter.find(r"index=(\d+)")[0])]
    bounds = [_constant(start), _constant(limit)]
    return None if None in bounds else bounds[1] - bounds[0]


def _constant(instruction):
    while instruction.opcode in ("copy", "copy-start", "copy-done", "bitcast"):
        instruction = instruction.operands[0]
    return int(instruction.literal) if instruction.opcode == "constant" else None


def group_size(collective: Instruction, devices: int) -> int:
    """How many devices take part together.

    replica_groups are listed, or given as a grid, or by axes of a mesh.
    """
    listed = collective.find(r"replica_groups=\{\{([\d,]*)\}")
    if listed:
        return len(listed[0].split(","))
    grid = collective.find(r"replica_groups=\[\d+,(\d+)\]")
    if grid:
        return int(grid[0])
    mesh = collective.find(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}")
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[0][0]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[0][1])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices
