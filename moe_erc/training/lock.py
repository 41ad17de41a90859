"""One run in a directory at a time: a lock that the system takes back with the process, however that ends.

Process 0 of a run holds it; an evaluation asks for none. Where there are no such locks, in a bucket
and on some network file systems, nothing keeps two runs apart: there it is for whoever starts them.
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
    """The open file that holds the lock of a directory for as long as it is kept; None where there are no locks.

    ValueError, naming process and host of the run that has it.
    """
    if is_remote(directory):
        return None
    file = open(directory / "lock", "a+", encoding="utf-8")  # noqa: SIM115  it stays open: that is the lock
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
