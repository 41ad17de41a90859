"""A document, the split it belongs to, and the account of how a source was divided.

If a source has no validation split, the hash of a text decides its split. The split then depends on
nothing else: not on the machine, the order of reading, or the other texts. Equal texts are in one
split.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import NamedTuple


class Document(NamedTuple):
    """One text, its split ("train" or "validation") and its domain.

    The domain is "" if the source has only one.
    """

    split: str
    domain: str
    text: bytes


@dataclasses.dataclass(frozen=True)
class Account:
    """The account of a source: which part became which split, and what is not read."""

    splits: str  # one line
    ignored: Mapping[str, int]  # what kind of thing -> how many of them


def split_by_hash(text: bytes, validation_fraction: float) -> str:
    """Put a text into "validation" with the given probability, as a pure function of the text."""
    position = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") / 2**64
    return "validation" if position < validation_fraction else "train"


def divided_by_hash(what: str, validation_fraction: float) -> str:
    """The line of an `Account` for a source that is divided by the hash of each text."""
    percent = 100 * validation_fraction
    return f"{what}: {percent:g} % of the documents are held out, by the hash of their text"
