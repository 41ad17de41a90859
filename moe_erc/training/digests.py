"""Whether a checkpoint is what was saved, by the size and CRC of every file.

The digests are written with the checkpoint and compared before it is read. They are one more item
of the checkpoint. It is finished last, before the step gets its number, so a numbered step without
it is damaged, or of an earlier version. CRC-32 finds the damage that disks and interrupted copies
do; it is no proof against malice.

Right bytes do not make a checkpoint. `contents.py` therefore looks, when digests are written and
when they are compared, for all that a restore needs.
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
    """What orbax calls to write the item.

    `finalize` runs on process 0 alone, in the background, once the items before are complete.
    """

    def __init__(self):
        self._expected = None

    def save(self, directory: epath.Path, args: "DigestSave") -> None:
        """Notes what the checkpoint must hold. Nothing can be written yet; saves do not overlap."""
        self._expected = args.shapes

    def restore(self, directory: epath.Path, args: "DigestSave") -> None:
        """Nothing: only `find_fault` reads the item."""

    def finalize(self, directory: epath.Path) -> None:
        """Writes {path: [bytes, CRC-32]} of all files of the other items.

        ValueError if what was to be saved cannot be restored from them: the step does not get its
        number, and the next save, wait or close fails.
        """
        step = directory.parent
        if self._expected is not None:
            gap = contents.find_gap(step, self._expected)
            if gap:
                raise ValueError(gap)
        # Only the items: orbax still changes its own files beside them.
        items = sorted(path for path in step.iterdir() if path.is_dir() and path != directory)
        found = {}
        for item in items:
            for path in _files(item):
                found[path.relative_to(step).as_posix()] = digest(path)
        (directory / FILE).write_text(json.dumps(found), encoding="utf-8")


@ocp.args.register_with_handler(DigestHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class DigestSave(ocp.args.CheckpointArgs):
    """The argument of a save that asks for the item."""

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
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return [size, crc]


def find_fault(step_directory: epath.Path) -> str:
    """What is wrong with a checkpoint, in a few words; "" for an intact one.

    Of several processes each reads its share of the files, and all give the same answer.
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
    faults = {}
    for name in share:
        fault = _compare(step_directory / name, saved[name])
        if fault:
            faults[name] = fault
    # The first file at fault, of all processes. A process that did not read it only knows its name.
    first = _least(min(map(names.index, faults), default=len(names)))
    if first < len(names):
        return faults.get(names[first], f"{names[first]} is not what was saved")
    # Process 0 looks for gaps, and tells the others whether it found one.
    gap = contents.find_gap(step_directory) if jax.process_index() == 0 else ""
    is_whole = _least(int(not gap))
    if is_whole:
        return ""
    return gap or "it cannot be restored"


def _is_table(saved):
    """Whether it is {path within the checkpoint: [bytes, CRC-32]}.

    A path that leads out of the checkpoint is refused, so that no other file is opened.
    """
    if not isinstance(saved, dict):
        return False
    for name, numbers in saved.items():
        if name.startswith("/") or ".." in name.split("/"):
            return False
        if not isinstance(numbers, list) or [type(number) for number in numbers] != [int, int]:
            return False
    return True


def _least(number):
    """The least of the numbers of all processes."""
    # They first wait at a barrier with a long time limit: the exchange itself, a device collective,
    # has a short one.
    if jax.process_count() > 1:
        wait = ocp.multihost.get_barrier_sync_fn()
        wait(key=f"moe_erc digests {next(_comparisons)}", timeout_ms=1000 * READING_LIMIT)
    return int(np.min(multihost_utils.process_allgather(np.int32(number))))


def _compare(path, saved):
    """What is wrong with a file, in a few words; "" if it has the saved digest."""
    try:
        size, crc = digest(path)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    if size != saved[0]:
        return f"{path.name} has {size:,} bytes of {saved[0]:,}"
    return "" if crc == saved[1] else f"{path.name} has other bytes than were saved"
