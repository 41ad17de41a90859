"""Nothing that a real process prints ends it, wherever its standard output and error lead."""

import os
import pathlib
import subprocess
import sys

import pytest

from moe_erc.console import printable

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import contextlib, os, sys
from moe_erc import console
console.make_safe()
from moe_erc.tables import print_table
print_table("Tables", ("domain", "loss"), [("pr\\xf6se", "3.000")])
for number in range(20000):
    print("a sample \\ufffd of \\udcff and \\u4e2d", number)
print("an error \\ufffd \\udcff", file=sys.stderr)
opened = open(sys.argv[1], "w", encoding="utf-8")
with contextlib.suppress(OSError):
    os.write(1, b"from C++")  # what a library prints beside Python
opened.write("done")
"""


def run(mark, redirection="", **environment):
    """Runs a process in a shell with this redirection.

    Returns the finished process, and what it has written into the file `mark`.
    """
    command = [sys.executable, "-c", PROGRAM, str(mark)]
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command]
    done = subprocess.run(
        shell, cwd=ROOT, env=os.environ | environment, capture_output=True, timeout=120
    )
    return done, mark.read_text(encoding="utf-8")


ASCII = {"PYTHONIOENCODING": "ascii"}
POSIX = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX", "PYTHONIOENCODING": ""}
STRICT = {"PYTHONIOENCODING": "latin-1:strict"}


@pytest.mark.parametrize("environment", [ASCII, POSIX, STRICT, {"PYTHONUNBUFFERED": "1"}], ids=str)
def test_what_an_encoding_lacks_is_written_as_an_escape(environment, tmp_path):
    done, mark = run(tmp_path / "mark", **environment)
    assert done.returncode == 0 and mark == "done", done.stderr
    assert b"\\udcff" in done.stdout and b"19999" in done.stdout and b"\\udcff" in done.stderr
    assert b"3.000" in done.stdout and b"Traceback" not in done.stderr


@pytest.mark.parametrize("redirection", [
    ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1",
])  # fmt: skip
@pytest.mark.parametrize("environment", [{}, ASCII], ids=str)
def test_a_console_that_takes_nothing_ends_nothing(redirection, environment, tmp_path):
    done, mark = run(tmp_path / "mark", redirection, **environment)
    assert done.returncode == 0 and mark == "done", done.stderr
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


def test_a_reader_that_has_gone_ends_nothing(tmp_path):
    mark = tmp_path / "mark"
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(mark)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    program.stdout.readline()
    program.stdout.close()  # as `| head -1` does
    errors = program.stderr.read()
    program.stderr.close()
    assert program.wait(120) == 0 and mark.read_text(encoding="utf-8") == "done", errors
    assert b"Traceback" not in errors and b"BrokenPipe" not in errors


def test_a_pipe_that_does_not_block_loses_nothing(tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "mark")], cwd=ROOT, stdout=writer
    )
    os.close(writer)
    with open(reader, "rb") as opened:
        lines = opened.read().splitlines()
    assert program.wait(120) == 0
    assert sum(line.startswith(b"a sample") for line in lines) == 20000


def test_a_terminal_obeys_no_text():
    assert (
        printable("a\x1b[2J\r\x07\x9bb\n\tc é 中 \udcff")
        == "a\\x1b[2J\\r\\x07\\x9bb\n\tc é 中 \udcff"
    )
