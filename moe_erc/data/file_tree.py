"""Every name under a directory, with links followed; what is not read is listed with the reason."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moe_erc.checks import BadInput

HIDDEN = "hidden files or directories"
BROKEN = "broken links"
SPECIAL = "entries that are neither files nor directories"


class Entry(NamedTuple):
    """One name under a directory."""

    parts: tuple[str, ...]  # of the path below it
    kind: str  # "file", "directory", or "" for anything else
    bytes: int
    identity: tuple  # of the file to which a name or a link leads
    ignored: str = ""  # why it is never read


def entries(top: Path) -> Iterator[Entry]:
    """Every file and directory below `top`, in no order.

    A hidden directory is one entry, and is not entered.

    Raises:
      BadInput: for a link that leads to a directory above it.
      OSError: for a directory that must not be read.
    """
    found = os.stat(top)
    # Each directory that is still to be read, with the identities of all directories above it.
    waiting = [((), ((found.st_dev, found.st_ino),))]
    while waiting:
        parts, above = waiting.pop()
        for name in os.listdir(top.joinpath(*parts)):
            entry, device_and_inode = _look_at(top, (*parts, name))
            yield entry
            if entry.kind != "directory" or entry.ignored:
                continue
            if device_and_inode in above:
                raise _loop(top, entry.parts)
            waiting.append((entry.parts, (*above, device_and_inode)))


def stamp(path: Path) -> tuple[int, int, int, int]:
    """Size, times and inode of a file; a file with other content has another stamp."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _look_at(top: Path, parts: tuple[str, ...]) -> tuple[Entry, tuple[int, int]]:
    nowhere = (0, 0)
    if parts[-1].startswith("."):
        return Entry(parts, "", 0, nowhere, HIDDEN), nowhere
    try:
        found = top.joinpath(*parts).stat()
    except FileNotFoundError:
        return Entry(parts, "", 0, nowhere, BROKEN), nowhere
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _loop(top, parts) from None
        raise
    place = (found.st_dev, found.st_ino)
    if stat.S_ISDIR(found.st_mode):
        return Entry(parts, "directory", 0, place), place
    if stat.S_ISREG(found.st_mode):
        identity = place if found.st_ino else parts  # some file systems have no inode numbers
        return Entry(parts, "file", found.st_size, identity), place
    return Entry(parts, "", 0, place, SPECIAL), place


def _loop(top: Path, parts: tuple[str, ...]) -> BadInput:
    link = top.joinpath(*parts)
    return BadInput(
        f"data.sources: '{link}' is a link that leads back to itself or to a directory above; "
        "remove it"
    )
