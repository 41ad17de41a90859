"""Whether a checkpoint is what was saved: size and CRC of every file, written with it and compared before it is read.

Right bytes do not make a checkpoint: `contents.py` looks, at both times, for all that a restore
takes from them.

They are one more item of the checkpoint, finished last, before the step gets its number: a numbered
step without them is damaged, or of an earlier version. CRC-32 finds what disks and interrupted
copies do; it is no proof against malice.
"""

import dataclasses
import itertools
import json
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from moe_erc.training import contents

ITEM = "digests"
FILE = "files.json"
CHUNK = 1 << 24  # bytes read at a time
READING_LIMIT = 6 * 60 * 60  # seconds for the slowest process
_comparisons = itertools.count()


class DigestHandler(ocp.CheckpointHandler):
    """The item's handler.

    `finalize` runs on process 0 alone, in the background, once the items before are complete.
    """

    def __init__(self):
        self._expected = None

    def save(self, directory: epath.Path, args: "DigestSave") -> None:
        """There is nothing to write yet; of one save at a time it is noted what it must hold."""
        self._expected = args.shapes

    def restore(self, directory: epath.Path, args: "DigestSave") -> None:
        """Only `find_fault` reads it."""

    def finalize(self, directory: epath.Path) -> None:
        """Writes {path: [bytes, CRC-32]} of all files of the other items; orbax still changes its own beside them.

        ValueError if what was to be saved cannot be restored from them: the step does not get its
        number, and the next save, wait or close fails.
        """
        step = directory.parent
        if self._expected is not None and (gap := contents.find_gap(step, self._expected)):
            raise ValueError(gap)
        items = sorted(path for path in step.iterdir() if path.is_dir() and path != directory)
        found = {
            path.relative_to(step).as_posix(): digest(path)
            for item in items
            for path in _files(item)
        }
        (directory / FILE).write_text(json.dumps(found), encoding="utf-8")


@ocp.args.register_with_handler(DigestHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class DigestSave(ocp.args.CheckpointArgs):
    """What asks for the item."""

    shapes: list | None = None  # `contents.shapes_on_disk` of the state that is saved


def _files(directory):
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def digest(path: epath.Path) -> list[int]:
    """[bytes, CRC-32] of a file."""
    size = 0
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            size = size + len(chunk)
            crc = zlib.crc32(chunk, crc)
    return [size, crc]


def find_fault(step_directory: epath.Path) -> str:
    """What is wrong with a checkpoint in a few words, "" for an intact one; the same on every process.

    Of several processes each reads its share of the files.
    """
    try:
        saved = json.loads((step_directory / ITEM / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{ITEM}/{FILE} is missing"
    except OSError as error:
        return f"{ITEM}/{FILE} cannot be read: {error.strerror}"
    except (ValueError, RecursionError):
        return f"{ITEM}/{FILE} is no JSON"
    if not _is_table(saved):
        return f"{ITEM}/{FILE} is no table of the checkpoint's files"
    names = sorted(saved)
    share = names[jax.process_index() :: jax.process_count()]
    faults = {
        name: fault for name in share if (fault := _compare(step_directory / name, saved[name]))
    }
    first = _least(min(map(names.index, faults), default=len(names)))
    if first < len(names):
        return faults.get(names[first], f"{names[first]} is not what was saved")
    gap = contents.find_gap(step_directory) if jax.process_index() == 0 else ""
    return "" if _least(int(not gap)) else gap or "it cannot be restored"


def _is_table(saved):
    """Whether it is {path within the checkpoint: [bytes, CRC-32]}: no other file is opened."""
    return isinstance(saved, dict) and all(
        not name.startswith("/")
        and ".." not in name.split("/")
        and isinstance(numbers, list)
        and [type(number) for number in numbers] == [int, int]
        for name, numbers in saved.items()
    )


def _least(number):
    """The least of the numbers of all processes.

    First they wait where that is cheap: the exchange, a device collective, has a short time limit
    of its own.
    """
    if jax.process_count() > 1:
        wait = ocp.multihost.get_barrier_sync_fn()
        wait(key=f"moe_erc digests {next(_comparisons)}", timeout_ms=1000 * READING_LIMIT)
    return int(np.min(multihost_utils.process_allgather(np.int32(number))))


def _compare(path, saved):
    try:
        size, crc = digest(path)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    if size != saved[0]:
        return f"{path.name} has {size:,} bytes of {saved[0]:,}"
    return "" if crc == saved[1] else f"{path.name} has other bytes than were saved"
