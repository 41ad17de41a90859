"""How far a long piece of work has come: a bar on a terminal, and in a log a line now and then.

A log shows when the work begins, where it is every minute, and when it has ended.
"""

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

SECONDS = 60  # between two lines


class Lines:
    """As much of tqdm as is used here, in plain lines on standard error."""

    def __init__(self, what: str, total: int | None, unit: str):
        self._what = what
        self._total = total
        self._unit = unit
        self._stream = sys.stderr  # that of now: a library's bars are sent elsewhere while it works
        self._done = 0
        self._begun = time.monotonic()
        self._said = self._begun
        self._say(f"{total:,} {unit}" if total is not None else f"all {unit}")

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        if time.monotonic() - self._said >= SECONDS:
            self._said = time.monotonic()
            of = "" if self._total is None else f" of {self._total:,}"
            self._say(f"{self._done:,}{of} {self._unit} after {self._elapsed()}")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self._say(f"{self._done:,} {self._unit} in {self._elapsed()}")

    def _elapsed(self) -> str:
        return tqdm.format_interval(time.monotonic() - self._begun)

    def _say(self, line: str) -> None:
        print(f"{self._what}: {line}", file=self._stream)


def bar(what: str, total: int | None, unit: str) -> tqdm | Lines:
    """A context with `update(count)`. `what` is done, to `total` things called `unit`.

    None where nobody knows.
    """
    if sys.stderr.isatty():
        return tqdm(desc=what, total=total, unit=f" {unit}")
    return Lines(what, total, unit)


def over(items: Iterable, what: str, total: int | None, unit: str) -> Iterator:
    """The items, with a bar."""
    with bar(what, total, unit) as shown:
        for item in items:
            yield item
            shown.update()
