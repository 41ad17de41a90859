"""Progress of long work in a log: separate lines, none of them overwritten."""

import pytest

from moe_erc.data import bars


def test_the_beginning_every_minute_and_the_end(capsys, monkeypatch):
    now = iter(range(0, 1000, 25))  # seconds; every look at the clock takes 25 of them
    monkeypatch.setattr(bars.time, "monotonic", lambda: next(now))
    assert list(bars.over("abcdef", "Reading", 6, "files")) == list("abcdef")
    begun, *between, ended = capsys.readouterr().err.splitlines()
    assert begun == "Reading: 6 files" and ended.startswith("Reading: 6 files in ")
    assert between and all(" of 6 files after " in line for line in between)


def test_quick_work_has_two_lines_and_no_carriage_return(capsys):
    with bars.bar("Tokenising", None, "documents") as bar:
        for _ in range(1000):
            bar.update(1000)
    printed = capsys.readouterr().err
    assert "\r" not in printed
    assert printed.splitlines()[0] == "Tokenising: all documents"
    assert printed.splitlines()[1:] == ["Tokenising: 1,000,000 documents in 00:00"]


def test_work_that_failed_has_no_end(capsys):
    with pytest.raises(KeyError), bars.bar("Reading", 2, "files"):
        raise KeyError
    assert capsys.readouterr().err == "Reading: 2 files\n"
