"""Every path that a user gives is read here, and nowhere else: a local one, or gs://bucket/path.

`~` is the home directory, also where no shell has seen it; what is relative is taken from the
current directory; all other characters stand for themselves: no pattern, no variable, no URL. A
name that one of the libraries below would take for another file is refused: work would be written
where nobody can read it again.
"""

import errno
import glob
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from etils import epath

from moe_erc.checks import BadInput

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
PATTERN = re.compile(r"[*?\[\]]")


class LiteralPath(type(epath.Path("."))):
    """A local path in which `[`, `*` and `?` are characters.

    orbax looks for the parts of a checkpoint by `path.glob`, in which etils reads the path as a
    part of the pattern: in runs/lr[1e-3] it finds no parts, and completes a checkpoint without
    them.
    """

    def glob(self, pattern: str) -> Iterator[Self]:
        """The entries below this path that match a pattern."""
        for found in glob.iglob(os.path.join(glob.escape(os.fspath(self)), pattern)):
            yield self._new(found)


def is_remote(path: os.PathLike | str) -> bool:
    """Whether it is in a bucket, where files are written whole and never appended to."""
    return "://" in str(path)


def absolute(path: os.PathLike | str) -> epath.Path:
    """The same path from the root, local or in a bucket.

    BadInput of one line for one that cannot be used.
    """
    text = os.fspath(path)
    if not SCHEME.match(text):
        return LiteralPath(local(text))
    if not re.match(r"gs://[^/]", text):
        raise BadInput(
            f"{text!r}: give a path of this machine, without a scheme, or gs://bucket/path"
        )
    if found := PATTERN.search(text):
        raise BadInput(f"{text!r}: {found[0]!r} is a pattern in a bucket; use another name")
    _check_characters(text)
    return epath.Path(text)


def local(path: os.PathLike | str) -> Path:
    """The same path from the root of this machine.

    BadInput for one in a bucket, and for one that cannot be used.
    """
    text = os.fspath(path)
    if not text:
        raise BadInput("'' is no path: name a directory or a file")
    if SCHEME.match(text):
        raise BadInput(f"{text!r}: give a path of this machine, without a scheme")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise BadInput(
            f"{text!r}: there is no user {user[1:]!r}; a directory of that name is ./{user}"
        )
    found = Path(expanded).absolute()
    _check_characters(str(found))  # with those of the current directory
    return found


def writable_file(path: os.PathLike | str) -> Path:
    """The local path of a file that can be written, by trying: its directory is made.

    BadInput for any other.
    """
    found = local(path)
    try:
        found.parent.mkdir(parents=True, exist_ok=True)
        if found.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=found.parent):
            pass
    except OSError as error:
        raise BadInput(
            f"cannot write {found} ({error.strerror}): name a file that can be written"
        ) from None
    return found


def several(text: str) -> list[str]:
    """Paths separated by commas, or the one path that has commas in its name and is there."""
    if "," not in text or absolute(text).exists():
        return [text]
    return [path for path in text.split(",") if path]


def _check_characters(text):
    if "\\" in text:
        # tensorstore, which writes checkpoints, takes it for a slash: they would lie in another
        # directory.
        raise BadInput(
            f"{text!r}: '\\' is a separator to some libraries and not to others; use another name"
        )
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise BadInput(f"{text!r}: a path is UTF-8 without control characters; use another name")
