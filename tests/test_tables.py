"""Tables fit a terminal of any width, and are whole where output is redirected."""

import os
import pathlib
import pty
import re
import subprocess
import sys

import pytest

from moe_erc.tables import print_table

ROOT = pathlib.Path(__file__).parents[1]
ROWS = [(f"row {row}", *(f"{row}.{column:03}" for column in range(30))) for row in range(3)]
NUMBERS = {cell for _, *cells in ROWS for cell in cells}
PROGRAM = """
import sys
from moe_erc.tables import print_table
rows = [(f"row {row}", *(f"{row}.{column:03}" for column in range(30))) for row in range(3)]
print_table("Many", ("", *(f"measure {column}" for column in range(30))), rows)
"""


def numbers(text):
    return re.findall(r"\d\.\d{3}", text)


@pytest.mark.parametrize("columns", [20, 40, 80, 120])
def test_on_a_terminal_of_any_width(columns):
    leader, follower = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "dumb"}
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=follower, env=environment
    )
    os.close(follower)
    text = b""
    while piece := _read(leader):
        text += piece
    os.close(leader)
    assert program.wait(120) == 0
    lines = text.decode().replace("\r", "").split("\n")
    assert max(map(len, lines)) <= columns and set(numbers("\n".join(lines))) == NUMBERS
    assert max(map(len, lines)) > min(columns, 80) - 15  # the room that there is is used


def _read(leader):
    try:
        return os.read(leader, 65536)
    except OSError:  # the end, on Linux
        return b""


@pytest.mark.parametrize("columns", ["10", "40", "300"])
def test_redirected_it_does_not_depend_on_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    print_table("Many", ("", *(f"measure {column}" for column in range(30))), ROWS)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and sorted(numbers(text)) == sorted(NUMBERS)


def test_names_are_no_markup_and_move_no_cursor(capsys):
    print_table(
        "[/b]",
        ("[/i]", "[bold]"),
        [("runs/lr[/x]", "[red]1"), ("a\x1b[2Jb\nc", "2")],
        [(":smile:", "3")],
    )
    text = capsys.readouterr().out
    assert all(
        name in text
        for name in ("[/b]", "[/i]", "[bold]", "runs/lr[/x]", "[red]1", ":smile:", "\\x1b[2Jb\\nc")
    )
    assert "\x1b" not in text


def test_a_cell_that_is_wider_than_the_console_is_printed_whole(capsys):
    print_table("Wide", ("name", "number", "other"), [("a", "9" * 100, "1.5")])
    text = capsys.readouterr().out
    assert "9" * 100 in text and "1.5" in text
