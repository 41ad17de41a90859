"""Cached directories, which are complete or absent, and never half written.

A directory is filled under a temporary name beside its place and renamed in one step. A killed
process leaves only the temporary directory, which nobody reads. If two processes fill the same
directory, the second to finish drops its own copy and uses that of the first.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from moe_erc.checks import BadInput
from moe_erc.data import paths


def directory_of(cache_dir: str) -> Path:
    """The cache directory of a configuration; "" means $MOE_ERC_CACHE, or ~/.cache/moe_erc."""
    return paths.local(cache_dir or os.environ.get("MOE_ERC_CACHE", "") or "~/.cache/moe_erc")


def make_writable(directory: Path) -> None:
    """Create a directory in the cache.

    Raises:
      BadInput: if it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{secrets.token_hex(4)}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise BadInput(
            f"data.cache_dir: cannot write in '{directory}' ({error.strerror}); "
            "set data.cache_dir or $MOE_ERC_CACHE to a writable directory"
        ) from error


@contextlib.contextmanager
def filling(directory: Path) -> Iterator[Path]:
    """A context that yields a temporary directory to fill, and renames it to `directory`.

    If another process has made `directory` meanwhile, the temporary one is dropped.
    """
    make_writable(directory.parent)
    temporary = directory.with_name(f"{directory.name}.incomplete-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already after a successful rename


def digest(value: object) -> str:
    """A short name for a JSON-serialisable value: equal values, equal names, on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
