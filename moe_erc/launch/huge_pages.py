"""Memory in huge pages, on a CPU: XLA allocates the temporaries of a step anew for every step.

glibc takes such large blocks from the system and gives them back, so that every page of 4 KiB is faulted in and zeroed
again at every step: a tenth to a fifth of all CPU time (docs/performance.md). In pages of 2 MiB it is next to nothing,
but glibc asks for those only if its environment said so when the process started.
"""

import os
import pathlib
import sys

MODE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def enable():
    """Starts the program anew with huge pages; to be called before it has done anything but import.

    Returns where they are asked for or refused already, where the system leaves it to no program, and where the process
    is not that of the program alone: in a notebook, or in a test.
    """
    given = os.environ.get(VARIABLE, "")
    if TUNABLE in given or not _left_to_programs():
        return
    module = sys.modules["__main__"].__spec__  # of python -m
    if (module.name if module else sys.argv[0]) in sys.orig_argv:
        os.environ[VARIABLE] = ":".join(filter(None, (given, f"{TUNABLE}=1")))
        os.execv(sys.executable, sys.orig_argv)


def _left_to_programs():
    try:
        return "[madvise]" in MODE.read_text(encoding="utf-8")
    except OSError:  # another system, or a container that shows nothing of it
        return False
