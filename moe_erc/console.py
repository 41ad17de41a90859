"""Standard output and error that never end a run, and text that is safe for a terminal.

A character that the console's encoding lacks is written as an escape. If the console is closed,
gone (`| head -1`) or on a full disk, output is dropped and the program goes on.
"""

import contextlib
import io
import os
import select
import sys
import unicodedata


class _Unfailing(io.FileIO):
    """A stream of the process; output that the system does not take is dropped."""

    def write(self, data: bytes) -> int:
        try:
            written = super().write(data)
            # None means that the pipe does not block and its reader is slow.
            while written is None:
                select.select([], [self.fileno()], [])
                written = super().write(data)
        except OSError:
            return len(data)
        return written


def make_safe() -> None:
    """Replace `sys.stdout` and `sys.stderr` of a script.

    In a notebook or a test the streams stay as they are.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        setattr(sys, name, _nowhere(number) if stream is None else _safe(stream))


def _safe(stream):
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # under PYTHONUNBUFFERED there is no buffer between them
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(raw, io.FileIO):
        return stream
    with contextlib.suppress(OSError):  # the reader may be gone
        stream.flush()
    unfailing = _Unfailing(raw.fileno(), "wb", closefd=False)
    # Lines are written at once, so that a log has the lines of both streams in their order.
    return io.TextIOWrapper(
        io.BufferedWriter(unfailing),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=True,
        write_through=stream.write_through,
    )


def _nowhere(number):
    """A stream in place of one that was closed when the program started; it takes its number too.

    Otherwise the next file that is opened, such as a checkpoint, would get the number, and
    libraries written in C++ would print into it.
    """
    # It stays open as long as the process.
    stream = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    try:
        os.fstat(number)
    except OSError:
        os.dup2(stream.fileno(), number)
    return stream


def printable(text: str) -> str:
    """`text` with control characters, which a terminal would obey, as escapes.

    Newline and tab are kept.
    """
    return "".join(_escape(char) if _is_control(char) else char for char in text)


def _is_control(char: str) -> bool:
    return unicodedata.category(char) == "Cc" and char not in "\n\t"


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
