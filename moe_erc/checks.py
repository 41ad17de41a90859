"""How bad input is refused: by a `BadInput`. Any other error is a fault of the program.

A limit is data on the field that it limits:

    @dataclasses.dataclass(frozen=True)
    class TrainConfig:
        steps: int = within(least=1)
        schedule: str = among("cosine", "linear")
        decay: float = within(least=0, below=1, default=0.9)

        def __post_init__(self):
            check_fields(self, "train")

Every message names the value, its limit and the mend: `train.steps: 0 must be at least 1`.
"""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any

_LIMIT = "limit"  # the key of a field's metadata


class BadInput(ValueError):
    """An input that cannot be used. The message is one line: the value, its limit and the mend.

    A script ends on it with that line and exit code 2. Other errors end with a traceback and exit
    code 1.
    """


def is_refusal(error: Exception) -> bool:
    """Whether a user can mend the error: bad input, or a file that cannot be used."""
    is_about_a_file = isinstance(error, OSError) and bool(error.filename)
    return isinstance(error, BadInput) or is_about_a_file


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, above `above` and below `below`. NaN is in no range."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    finite: bool = True  # whether infinity is refused
    note: str = ""  # what a special value does, or an example

    def __contains__(self, value: float) -> bool:
        if value == math.inf:
            return not self.finite
        is_within_closed = self.least <= value <= self.most
        is_within_open = self.above < value < self.below
        return is_within_closed and is_within_open

    def __str__(self) -> str:
        limits = {
            "at least": self.least,
            "above": self.above,
            "at most": self.most,
            "below": self.below,
        }
        words = [f"{word} {limit}" for word, limit in limits.items() if abs(limit) < math.inf]
        text = " and ".join(words)
        # The usual cases in usual words.
        if text == "above 0":
            text = "positive"
        if self.least > -math.inf and self.most < math.inf:
            text = f"from {self.least} to {self.most}"
        return f"{text} ({self.note})" if self.note else text


def in_range(key: str, value: float, limit: Range) -> None:
    """Refuses what is no number, or a number out of the range. `key` names it in the message."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BadInput(f"{key}: {value!r} is no number; it must be {limit}")
    if value not in limit:
        finite = "finite and " if value == math.inf else ""
        raise BadInput(f"{key}: {value} must be {finite}{limit}")


def one_of(key: str, value: object, known: Iterable[str]) -> None:
    """Refuses what is not one of the known words.

    The message names it by `key`, and says which known word is nearest.
    """
    known = list(known)
    if value not in known:
        listed = ", ".join(known)
        raise BadInput(
            f"{key}: {value!r} is not one of {listed}; the nearest is {nearest(value, known)!r}"
        )


def nearest(name: object, known: Iterable[str]) -> str:
    """The known word, of at least one, that was probably meant."""
    [closest] = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0)
    return closest


def within(
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    finite: bool = True,
    note: str = "",
    default: Any = dataclasses.MISSING,
) -> Any:
    """A field of a dataclass that holds a number of a `Range`."""
    limit = Range(least, most, above, below, finite, note)
    return dataclasses.field(default=default, metadata={_LIMIT: limit})


def among(*known: str, default: Any = dataclasses.MISSING) -> Any:
    """A field of a dataclass that holds one of the known words."""
    return dataclasses.field(default=default, metadata={_LIMIT: known})


def check_fields(config: Any, block: str = "") -> None:
    """Refuses a dataclass with a field beyond its limit.

    The message names the field as `block.field`.
    """
    for field in dataclasses.fields(config):
        limit = field.metadata.get(_LIMIT)
        key = f"{block}.{field.name}" if block else field.name
        value = getattr(config, field.name)
        if isinstance(limit, Range):
            in_range(key, value, limit)
        elif limit is not None:
            one_of(key, value, limit)
