"""The largest temporary buffers of a compiled program, by name.

They are read from XLA's account of the place of every value:

    allocation 5: size 1048576, preallocated-temp:
     value: <13 fusion.1 @0> (size=1048576,offset=0): f32[512,512]{1,0}
"""

import pathlib
import re
import tempfile
from typing import NamedTuple

import jax

from benchmarks.compiled import hlo

ALLOCATION = re.compile(r"^allocation ", re.MULTILINE)
VALUE = re.compile(
    r"^ value: <\d+ ([\w.-]+)[^>]*> \(size=(\d+),offset=(\d+)\): (\w+\[[\d,]*\])", re.MULTILINE
)


class Buffer(NamedTuple):
    """One value of a program."""

    bytes: int
    shape: str
    origin: str  # the traced operation behind it


def compile_with_account(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """(executable, account); the account is XLA's text, or "" if the compiler writes none."""
    with tempfile.TemporaryDirectory() as directory:
        executable = lowered.compile({"xla_dump_to": directory})
        account = ""
        # Small programs beside the step may have accounts too; the longest one is that of the step.
        for path in pathlib.Path(directory).glob("*buffer-assignment.txt"):
            account = max(account, path.read_text(encoding="utf-8"), key=len)
        return executable, account


def largest(account: str, text: str, count: int) -> list[Buffer]:
    """The `count` largest temporaries of a program.

    `text` is its `Compiled.as_text()`. Of values that share a place at different times only the
    largest is listed.
    """
    values = []
    for number, allocation in enumerate(ALLOCATION.split(account)):
        heading = allocation.partition("\n")[0]
        if "preallocated-temp" in heading:
            for name, size, offset, shape in VALUE.findall(allocation):
                values.append((number, name, int(size), offset, shape))
    values.sort(key=lambda value: value[2], reverse=True)
    origins = hlo.origins(hlo.parse(text))
    places = set()
    found = []
    for allocation, name, size, offset, shape in values:
        if (allocation, offset) not in places and len(found) < count:
            places.add((allocation, offset))
            found.append(Buffer(size, shape, origins.get(name) or name))
    return found
