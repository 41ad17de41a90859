"""The largest temporary buffers of a compiled program, by name.

They are read from XLA's account of where every value lies:

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
    """(executable, account): `account` is XLA's text, "" of a compiler that writes none."""
    with tempfile.TemporaryDirectory() as directory:
        executable = lowered.compile({"xla_dump_to": directory})
        accounts = sorted(
            pathlib.Path(directory).glob("*buffer-assignment.txt"),
            key=lambda path: path.stat().st_size,
        )
        return executable, accounts[-1].read_text(encoding="utf-8") if accounts else ""


def largest(account: str, text: str, count: int) -> list[Buffer]:
    """The `count` largest temporaries.

    Values that share a place at different times are told once, by the largest.

    `text` is the program's, `Compiled.as_text()`.
    """
    temporaries = [
        part for part in ALLOCATION.split(account) if "preallocated-temp" in part.partition("\n")[0]
    ]
    values = [
        (number, *value) for number, part in enumerate(temporaries) for value in VALUE.findall(part)
    ]
    origins = hlo.origins(hlo.parse(text))
    places = set()
    found = []
    for allocation, name, size, offset, shape in sorted(values, key=lambda value: -int(value[2])):
        if (allocation, offset) not in places and len(found) < count:
            places.add((allocation, offset))
            found.append(Buffer(int(size), shape, origins.get(name) or name))
    return found
