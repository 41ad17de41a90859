"""A program restarts itself with huge pages, once, and only where it is a program of its own."""

import os
import subprocess
import sys

import pytest

from moe_erc.launch import huge_pages
from tests import script

PROGRAM = """
import os, pathlib, sys
from moe_erc.launch import huge_pages
huge_pages.MODE = pathlib.Path(sys.argv[1])
with open(sys.argv[2], "a") as starts:
    starts.write("x")
huge_pages.enable()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[3:])
"""


@pytest.fixture
def said(tmp_path):
    """Runs the program in a system of this mode, "" for none.

    Returns (what it printed, how often it was started).
    """

    def run(mode, as_module, given=None):
        if mode:
            (tmp_path / "enabled").write_text(mode)
        (tmp_path / "program.py").write_text(PROGRAM)
        (tmp_path / "starts").unlink(missing_ok=True)
        environment = os.environ | {"PYTHONPATH": f"{script.ROOT}:{tmp_path}"}
        environment.pop("GLIBC_TUNABLES", None)
        environment |= {"GLIBC_TUNABLES": given} if given else {}
        start = ["-m", "program"] if as_module else [tmp_path / "program.py"]
        command = [
            sys.executable,
            "-W",
            "ignore",
            *start,
            tmp_path / "enabled",
            tmp_path / "starts",
            "--a=b c",
            "",
        ]
        printed = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=300
        )
        return printed.stdout.strip(), len((tmp_path / "starts").read_text())

    return run


@pytest.mark.parametrize("as_module", [False, True])
def test_a_program_starts_anew_with_its_arguments(said, as_module):
    assert said("always [madvise] never", as_module) == (
        "glibc.malloc.hugetlb=1 ['--a=b c', '']",
        2,
    )


def test_what_the_environment_says_is_kept(said):
    mode, other = "always [madvise] never", "glibc.malloc.arena_max=2"
    assert said(mode, False, other) == (f"{other}:glibc.malloc.hugetlb=1 ['--a=b c', '']", 2)
    refused = "glibc.malloc.hugetlb=0"
    assert said(mode, False, refused) == (f"{refused} ['--a=b c', '']", 1)


@pytest.mark.parametrize("mode", ["[always] madvise never", "always madvise [never]", ""])
def test_where_the_system_decides_nothing_happens(said, mode):
    assert said(mode, False) == ("None ['--a=b c', '']", 1)


def test_another_program_goes_on_as_it_is(monkeypatch, tmp_path):
    (tmp_path / "enabled").write_text("always [madvise] never")
    monkeypatch.setattr(huge_pages, "MODE", tmp_path / "enabled")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("it was started anew"))
    monkeypatch.setattr(sys, "argv", ["train.py"])  # as in a notebook, or run by a test
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    huge_pages.enable()
    assert "GLIBC_TUNABLES" not in os.environ


def test_only_training_asks_for_them():
    """Evaluation gives little memory back: a second start would take longer than it saves."""
    asking = [path.name for path in script.ROOT.glob("*.py") if "huge_pages" in path.read_text()]
    package = script.ROOT / "moe_erc"
    asking += [path.name for path in package.rglob("*.py") if "huge_pages" in path.read_text()]
    assert asking == ["train.py"]
