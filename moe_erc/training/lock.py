"""A lock by which only one run at a time writes to a directory.

The system releases it with the process, however that ends. Process 0 of a run holds it; an
evaluation asks for none. In a bucket and on some network file systems there are no such locks, and
nothing keeps two runs apart: whoever starts them must.
"""

import errno
import fcntl
import os
import socket
from typing import TextIO

from etils import epath

from moe_erc.checks import BadInput
from moe_erc.data.paths import is_remote

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def lock(directory: epath.Path) -> TextIO | None:
    """The open file that holds the lock of a directory; None where there are no locks.

    The lock is held as long as the file is open. BadInput if another run has it; the message names
    that run's process and host.
    """
    if is_remote(directory):
        return None
    # Without `with`: an open file is the lock.
    file = open(directory / "lock", "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise BadInput(
            f"a run is writing to {directory} ({holder}): wait for it or use another --workdir"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
