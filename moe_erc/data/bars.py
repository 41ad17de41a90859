"""The progress of long work: a bar on a terminal, and lines in a log.

A log shows when the work begins, its progress every minute, and when it has ended.
"""

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

SECONDS = 60  # between two lines


class Lines:
    """The part of tqdm that is used here, in plain lines on standard error."""

    def __init__(self, what: str, total: int | None, unit: str):
        self._what = what
        self._total = total
        self._unit = unit
        # Kept, because standard error is redirected while a library works that shows its own bars.
        self._stream = sys.stderr
        self._done = 0
        self._begun = time.monotonic()
        self._said = self._begun
        self._say(f"{total:,} {unit}" if total is not None else f"all {unit}")

    def update(self, count: int = 1) -> None:
        """Count that many more as done."""
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
    """A context with `update(count)` that shows progress.

    `what` names the work, and `unit` the things that are counted. `total` is None if unknown.
    """
    if sys.stderr.isatty():
        return tqdm(desc=what, total=total, unit=f" {unit}")
    return Lines(what, total, unit)


def over(items: Iterable, what: str, total: int | None, unit: str) -> Iterator:
    """Yield the items and show the progress."""
    with bar(what, total, unit) as shown:
        for item in items:
            yield item
            shown.update()
