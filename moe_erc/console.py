"""Standard output and standard error that never end a run, and text that does no harm to a terminal.

A character that the console's encoding lacks is written as an escape. A console that is closed, gone (`| head -1`) or
on a full disk takes no more output, and the program goes on without it.
"""

import contextlib
import io
import os
import select
import sys
import unicodedata


class _Unfailing(io.FileIO):
    """A stream of the process; what the system does not take is dropped."""

    def write(self, data: bytes) -> int:
        try:
            # None: the reader of a pipe that does not block is slow.
            while (written := super().write(data)) is None:
                select.select([], [self.fileno()], [])
        except OSError:
            return len(data)
        return written


def make_safe() -> None:
    """Replaces `sys.stdout` and `sys.stderr` of a script.

    In a notebook or a test they stay the streams they are.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        setattr(sys, name, _nowhere(number) if stream is None else _safe(stream))


def _safe(stream):
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # there is no buffer between them under PYTHONUNBUFFERED
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(raw, io.FileIO):
        return stream
    with contextlib.suppress(OSError):  # nobody reads it any more
        stream.flush()
    unfailing = _Unfailing(raw.fileno(), "wb", closefd=False)
    # A log shows a line when it is printed, and lines of both streams in their order.
    return io.TextIOWrapper(
        io.BufferedWriter(unfailing),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=True,
        write_through=stream.write_through,
    )


def _nowhere(number):
    """A stream in place of one that was closed when the program started, and its number with it.

    A number that nobody holds would be that of the next file opened, such as a checkpoint, and
    libraries written in C++ print to it.
    """
    stream = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115  it stays open as long as the process
    try:
        os.fstat(number)
    except OSError:
        os.dup2(stream.fileno(), number)
    return stream


def printable(text: str) -> str:
    """`text` without what a terminal would obey: control characters but newline and tab are written as escapes."""
    return "".join(_escape(char) if _is_control(char) else char for char in text)


def _is_control(char: str) -> bool:
    return unicodedata.category(char) == "Cc" and char not in "\n\t"


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
