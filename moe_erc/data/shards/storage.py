"""Where shards lie: on local or mounted paths, or in object stores.

Both read any range of bytes of a file, or raise `ShardError` with the file and the range. A read
gives all bytes of the range or none.
"""

import concurrent.futures
import errno
import glob
import os
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import fsspec
import numpy as np

from moe_erc.checks import BadInput
from moe_erc.data import paths

# Object stores and the packages that fsspec reads them with. "memory" is of fsspec itself.
EXTRAS = {"gs": "gcs", "s3": "s3", "memory": ""}
_SCHEME = re.compile(r"([a-z0-9]+)://")
# Seconds before each further attempt of a read that failed: half a minute in all.
WAITS = (0.25, 0.5, 1, 2, 4, 8, 16)
# Reads of an object store in flight at once. One waits for the latency of the store.
REMOTE_READS = 64


class File(NamedTuple):
    """A file and its size in bytes."""

    path: str
    size: int


class ShardError(OSError):
    """A range of a shard that cannot be read, or that holds what cannot be trained on.

    Its arguments are those of an OSError: a number, a message and the path of the shard.
    """


class Storage(Protocol):
    """Reads files of one kind of place."""

    is_remote: bool

    def find(self, pattern: str) -> list[File]:
        """The files that match a pattern, sorted by path."""

    def size(self, path: str) -> int | None:
        """The bytes of a file, or None if there is no such file."""

    def read(self, path: str, start: int, stop: int) -> np.ndarray:
        """The bytes [start, stop) of a file, uint8. ShardError if they cannot all be read."""


def of(pattern: str) -> Storage:
    """The storage that a path or pattern lies in."""
    match = _SCHEME.match(pattern)
    if not match:
        return Local()
    scheme = match[1]
    if scheme not in EXTRAS:
        raise BadInput(
            f"data.sources: {pattern!r}: shards are read from local paths, gs:// and s3://; "
            "mount the store or copy the shards"
        )
    try:
        file_system = fsspec.filesystem(scheme)
    except ImportError:
        raise BadInput(
            f"data.sources: {pattern!r} needs a package; pip install 'moe_erc[{EXTRAS[scheme]}]'"
        ) from None
    return Remote(scheme, file_system)


def absolute(pattern: str) -> str:
    """The pattern from any directory: a local one becomes absolute."""
    return pattern if _SCHEME.match(pattern) else str(paths.local(pattern))


class Local:
    """Files of this machine, or of a file system that is mounted on it.

    A window is one positional read. A memory map of a cold file would read megabytes around it
    (docs/performance.md).
    """

    is_remote = False

    def find(self, pattern: str) -> list[File]:
        found = []
        for path in glob.iglob(str(paths.local(pattern)), recursive=True):
            if os.path.isfile(path):
                found.append(File(path, os.path.getsize(path)))
        return sorted(found)

    def size(self, path: str) -> int | None:
        try:
            return os.path.getsize(path)
        except FileNotFoundError:
            return None

    def read(self, path: str, start: int, stop: int) -> np.ndarray:
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(start)
                data = file.read(stop - start)
        except OSError as error:
            raise ShardError(errno.EIO, f"cannot be read ({error.strerror})", path) from None
        if len(data) != stop - start:
            size = self.size(path)
            message = f"has {size:,} bytes now, and bytes {start:,} to {stop:,} are needed"
            raise ShardError(errno.EIO, message, path)
        return np.frombuffer(data, np.uint8)


class Remote:
    """Objects of a store that fsspec knows, by range reads that are repeated if they fail."""

    is_remote = True

    def __init__(self, scheme: str, file_system: Any):
        self._scheme = scheme
        self._files = file_system

    def find(self, pattern: str) -> list[File]:
        try:
            found = self._attempt(
                lambda: self._files.glob(pattern, detail=True), pattern, "cannot be listed"
            )
        except FileNotFoundError:  # of a bucket that does not exist
            return []
        files = []
        for path, entry in found.items():
            if entry["type"] == "file":
                files.append(File(f"{self._scheme}://{path.lstrip('/')}", entry["size"]))
        return sorted(files)

    def size(self, path: str) -> int | None:
        try:
            return self._attempt(lambda: self._files.info(path)["size"], path, "cannot be found")
        except FileNotFoundError:
            return None

    def read(self, path: str, start: int, stop: int) -> np.ndarray:
        if start == stop:
            return np.zeros(0, np.uint8)

        def whole():
            data = self._files.cat_file(path, start=start, end=stop)
            # A connection that broke off may look like the end of the object.
            if len(data) != stop - start:
                raise OSError(f"{len(data):,} of {stop - start:,} bytes came")
            return data

        try:
            data = self._attempt(whole, path, f"bytes {start:,} to {stop:,} cannot be read")
        except FileNotFoundError:
            raise ShardError(errno.ENOENT, "is no longer there", path) from None
        return np.frombuffer(data, np.uint8)

    def _attempt(self, call: Callable, path: str, failure: str) -> Any:
        """The result of a call; it is repeated for as long as the store may recover.

        FileNotFoundError if there is no such object.
        """
        last = None
        for wait in (*WAITS, 0):
            try:
                return call()
            except FileNotFoundError:
                raise
            except PermissionError as error:
                message = f"may not be read ({_reason(error)})"
                raise ShardError(errno.EACCES, message, path) from None
            except Exception as error:  # every library of a store has errors of its own
                last = error
            time.sleep(wait)
        message = f"{failure} in {len(WAITS) + 1} attempts ({_reason(last)})"
        raise ShardError(errno.EIO, message, path) from last


def _reason(error: Exception) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def each(storage: Storage, call: Callable, items: Iterable) -> list:
    """call(item) of every item in their order, at once where the storage has a latency."""
    if not storage.is_remote:
        return [call(item) for item in items]
    with concurrent.futures.ThreadPoolExecutor(REMOTE_READS) as pool:
        return list(pool.map(call, items))
