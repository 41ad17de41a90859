"""A document and the split it belongs to.

Where a source has no validation split, the hash of the text decides: the same text is always on the same side, on every
machine, in any order of reading, and whatever else the source holds. Equal texts cannot end up in both splits.
"""

import hashlib
from collections.abc import Collection
from typing import NamedTuple

# The names under which people keep held-out text, the most fitting first.
HELD_OUT_NAMES = ("validation", "valid", "val", "dev", "test")


class Document(NamedTuple):
    """One text, its split ("train" or "validation") and its domain ("" where the source is one domain)."""

    split: str
    domain: str
    text: bytes


def split_by_hash(text: bytes, validation_fraction: float) -> str:
    """Put a text into "validation" with the given probability, as a pure function of the text."""
    position = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") / 2**64
    return "validation" if position < validation_fraction else "train"


def held_out_name(names: Collection[str]) -> str | None:
    """The one of a source's own splits to validate on, or None if it has none."""
    return next((name for name in HELD_OUT_NAMES if name in names), None)
