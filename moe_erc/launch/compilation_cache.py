"""Compiled programs are kept: a second start loads what the first one compiled.

They lie in programs/PROCESSOR of the cache directory (`data/cache.py`), under jax's own keys: of
program, compiler, options and devices. A program for a CPU depends on its instructions and number
of cores besides, hence the folder.
"""

import contextlib
import os
import pathlib
import platform

import jax

from moe_erc.checks import BadInput
from moe_erc.data import cache

_OF_A_PROCESSOR = (
    "model name",
    "flags",
    "CPU implementer",
    "CPU part",
    "Features",
)  # lines of /proc/cpuinfo


def enable() -> None:
    """Has jax keep programs, unless it was told where or is one of several processes.

    It is told by JAX_COMPILATION_CACHE_DIR.

    Of several, jax lets the first alone write. Where they share no storage, the others would
    compile what the first one loads, and on GPUs wait in vain for it to measure kernels with them.
    With shared storage, tell jax of it.
    """
    if jax.config.jax_compilation_cache_dir is not None or jax.distributed.is_initialized():
        return
    directory = cache.directory_of("") / "programs" / _processor()
    with contextlib.suppress(
        OSError, BadInput
    ):  # where nothing can be written, every start compiles
        cache.make_writable(directory)
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update(
            "jax_persistent_cache_min_compile_time_secs", 0
        )  # there are hundreds of small ones


def _processor():
    """A name for the processor and the number of its cores."""
    with contextlib.suppress(OSError):  # where there is no such file, the architecture must do
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return cache.digest(
            [os.cpu_count(), sorted({line for line in lines if line.startswith(_OF_A_PROCESSOR)})]
        )
    return cache.digest([os.cpu_count(), platform.machine()])
