"""The paths that users give, which are all read here: local ones, or gs://bucket/path.

`~` is the home directory, also if no shell has replaced it. A relative path starts at the current
directory. All other characters stand for themselves: there are no patterns, variables or URLs. A
name that a library would take for another file is refused, because work would be written where
nobody can read it again.
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
    """A local path in which `[`, `*` and `?` are plain characters.

    orbax looks for the parts of a checkpoint by `path.glob`, and etils reads the path as a part of
    the pattern. In runs/lr[1e-3] it would find no parts, and complete a checkpoint without them.
    """

    def glob(self, pattern: str) -> Iterator[Self]:
        """The entries below this path that match a pattern."""
        for found in glob.iglob(os.path.join(glob.escape(os.fspath(self)), pattern)):
            yield self._new(found)


def is_remote(path: os.PathLike | str) -> bool:
    """Whether a path is in a bucket, where files are written whole and never appended to."""
    return "://" in str(path)


def absolute(path: os.PathLike | str) -> epath.Path:
    """The absolute path, local or in a bucket.

    BadInput for a path that cannot be used.
    """
    text = os.fspath(path)
    if not SCHEME.match(text):
        return LiteralPath(local(text))
    if not re.match(r"gs://[^/]", text):
        raise BadInput(
            f"{text!r}: give a path of this machine, without a scheme, or gs://bucket/path"
        )
    found = PATTERN.search(text)
    if found:
        raise BadInput(f"{text!r}: {found[0]!r} is a pattern in a bucket; use another name")
    _check_characters(text)
    return epath.Path(text)


def local(path: os.PathLike | str) -> Path:
    """The absolute path on this machine.

    BadInput for a path in a bucket, and for one that cannot be used.
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
    _check_characters(str(found))  # the current directory may have such characters too
    return found


def writable_file(path: os.PathLike | str) -> Path:
    """The local path of a file that can be written; its directory is created.

    BadInput if writing there fails, which is tried.
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
    """Paths separated by commas, or one path that exists and has commas in its name."""
    if "," not in text or absolute(text).exists():
        return [text]
    return [path for path in text.split(",") if path]


def _check_characters(text):
    if "\\" in text:
        # tensorstore, which writes checkpoints, takes a backslash for a slash, and would write to
        # another directory.
        raise BadInput(
            f"{text!r}: '\\' is a separator to some libraries and not to others; use another name"
        )
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise BadInput(f"{text!r}: a path is UTF-8 without control characters; use another name")
