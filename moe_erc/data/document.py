"""A document, the split it belongs to, and the account of how a source was divided.

Where a source has no validation split, the hash of the text decides: the same text is always on the
same side, on every machine, in any order of reading, and whatever else the source holds. Equal
texts cannot end up in both splits.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import NamedTuple


class Document(NamedTuple):
    """One text, its split ("train" or "validation") and its domain.

    The domain is "" where the source is one domain.
    """

    split: str
    domain: str
    text: bytes


@dataclasses.dataclass(frozen=True)
class Account:
    """What is said of a source before it is used.

    It says which part became which split, and what is not read.
    """

    splits: str  # one line
    ignored: Mapping[str, int]  # what kind of thing -> how many of them


def split_by_hash(text: bytes, validation_fraction: float) -> str:
    """Put a text into "validation" with the given probability, as a pure function of the text."""
    position = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") / 2**64
    return "validation" if position < validation_fraction else "train"


def divided_by_hash(what: str, validation_fraction: float) -> str:
    """How an `Account` says that nothing but the hash of a text decides."""
    percent = 100 * validation_fraction
    return f"{what}: {percent:g} % of the documents are held out, by the hash of their text"
