"""A cache of compiled programs: a second start loads what the first one compiled.

The programs lie in programs/PROCESSOR of the cache directory (`data/cache.py`). jax names them by
the program, the compiler, its options and the devices. A program for a CPU also depends on the
instructions of the processor and the number of its cores, which the folder stands for.
"""

import contextlib
import os
import pathlib
import platform

import jax

from moe_erc.checks import BadInput
from moe_erc.data import cache

# Lines of /proc/cpuinfo that tell processors apart.
_OF_A_PROCESSOR = ("model name", "flags", "CPU implementer", "CPU part", "Features")


def enable() -> None:
    """Let jax keep compiled programs.

    Nothing is done if JAX_COMPILATION_CACHE_DIR names a directory, or if there are several
    processes. jax lets only the first of several processes write. Without shared storage the others
    would compile what the first one loads. On GPUs they would also wait in vain for the first
    process to measure kernels with them. With shared storage, set JAX_COMPILATION_CACHE_DIR.
    """
    if jax.config.jax_compilation_cache_dir is not None or jax.distributed.is_initialized():
        return
    directory = cache.directory_of("") / "programs" / _processor()
    # If nothing can be written, every start compiles.
    with contextlib.suppress(OSError, BadInput):
        cache.make_writable(directory)
        jax.config.update("jax_compilation_cache_dir", str(directory))
        # There are hundreds of small programs, which are worth keeping too.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _processor():
    """A name for the processor and the number of its cores."""
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        of_processor = {line for line in lines if line.startswith(_OF_A_PROCESSOR)}
        return cache.digest([os.cpu_count(), sorted(of_processor)])
    # A system without that file tells its architecture only.
    return cache.digest([os.cpu_count(), platform.machine()])
