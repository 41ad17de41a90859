"""Memory in huge pages for training on a CPU.

XLA allocates the temporaries of a step anew in every step. glibc takes such large blocks from the
system and returns them. The system therefore maps and zeroes every page of 4 KiB again in every
step. Pages of 2 MiB need next to no such work. glibc uses them only if its environment says so when
the process starts, so `train.py` starts itself anew, once.

Measured on 2 cores, medians of a step (docs/performance.md): 348 ms without and 284 ms with huge
pages at `tiny`, 762 and 682 ms at E 16, 1,322 and 1,137 ms at E 64. The second start takes 2.3 s.
`GLIBC_TUNABLES=glibc.malloc.hugetlb=0` in the environment turns huge pages off.
"""

import os
import pathlib
import sys

MODE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
VARIABLE = "GLIBC_TUNABLES"
TUNABLE = "glibc.malloc.hugetlb"


def enable() -> None:
    """Start the program anew with huge pages.

    This must be called before the program has done anything but import. Nothing is done if the
    environment asks for huge pages or refuses them, if the system does not leave the choice to
    programs, or if other code runs in the process, as in a notebook or a test.
    """
    given = os.environ.get(VARIABLE, "")
    if TUNABLE in given or not _left_to_programs():
        return
    module = sys.modules["__main__"].__spec__  # of python -m
    started_as = module.name if module else sys.argv[0]
    if started_as in sys.orig_argv:
        tunables = [given] if given else []
        os.environ[VARIABLE] = ":".join([*tunables, f"{TUNABLE}=1"])
        os.execv(sys.executable, sys.orig_argv)


def _left_to_programs() -> bool:
    try:
        return "[madvise]" in MODE.read_text(encoding="utf-8")
    except OSError:  # another system, or a container that does not show the file
        return False
