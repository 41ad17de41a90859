"""What tokenising a large source on one machine takes, in one line and before most of it is done.

Text that fits one machine is tokenised when a run first needs it, by every host for itself. For
much more text the work belongs on many machines, once: `tokenize.py` makes token shards there.
"""

import sys
import time

from tqdm import tqdm

LARGE = 2 * 10**9  # bytes of text; a source below this is tokenised without a word
MEASURED = 2**24  # bytes of text that are tokenised before the line is printed


class Forecast:
    """Measures the first documents of a large source, and says what all of it will take."""

    def __init__(self, name: str, stored_bytes: int, token_bytes: int):
        """`name` is of the source, and `token_bytes` what one token takes in the cache."""
        self._name = name
        self._stored_bytes = stored_bytes
        self._token_bytes = token_bytes
        self._is_due = stored_bytes >= LARGE
        self._begun = time.monotonic()
        self._text_bytes = 0
        self._tokens = 0

    def add(self, text_bytes: int, tokens: int) -> None:
        """Count tokenised text; print the line when enough has been measured."""
        if not self._is_due:
            return
        self._text_bytes += text_bytes
        self._tokens += tokens
        if self._text_bytes >= MEASURED:
            self._is_due = False
            print(self._line(time.monotonic() - self._begun), file=sys.stderr)

    def _line(self, seconds: float) -> str:
        whole = self._stored_bytes / self._text_bytes
        duration = tqdm.format_interval(seconds * whole)
        return (
            f"data {self._name!r}: at least {self._stored_bytes / 1e9:,.1f} GB of text; the first "
            f"documents were tokenised at {self._tokens / seconds:,.0f} tokens/s, so all of it "
            f"takes about {duration} here and {self._tokens * whole * self._token_bytes / 1e9:,.1f}"
            " GB in data.cache_dir, on every host; to make token shards once, on many machines: "
            "python -m moe_erc.data.tokenize (docs/data.md#which-way-at-which-size)"
        )
