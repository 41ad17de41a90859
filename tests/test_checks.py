"""Limits as data: what is refused, and in which words."""

import dataclasses
import math

import pytest

from moe_erc.checks import BadInput, Range, among, check_fields, in_range, nearest, one_of, within


@dataclasses.dataclass(frozen=True)
class Options:
    """A block of a config."""

    steps: int = within(least=1)
    share: float = within(above=0, most=1, note="1 is all", default=0.5)
    name: str = among("cosine", "linear", default="linear")
    other: str = "has no limit"

    def __post_init__(self):
        check_fields(self, "train")


@pytest.mark.parametrize(
    ("limit", "value", "words"),
    [
        (Range(least=1), 0, "a.b: 0 must be at least 1"),
        (Range(above=0), 0.0, "a.b: 0.0 must be positive"),
        (Range(above=0), math.nan, "a.b: nan must be positive"),
        (Range(above=0), math.inf, "a.b: inf must be finite and positive"),
        (Range(above=0, finite=False), -math.inf, "a.b: -inf must be positive"),
        (Range(least=0, below=1), 1.0, "a.b: 1.0 must be at least 0 and below 1"),
        (Range(above=0, most=1), 1.5, "a.b: 1.5 must be above 0 and at most 1"),
        (Range(0, 2**32 - 1), 10**400, "must be from 0 to 4294967295"),
        (
            Range(least=1, note="steps"),
            True,
            "a.b: True is no number; it must be at least 1 (steps)",
        ),
    ],
)
def test_a_number_out_of_range_is_named_with_its_limit(limit, value, words):
    with pytest.raises(BadInput) as refusal:
        in_range("a.b", value, limit)
    assert str(refusal.value).endswith(words)


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        (Range(least=1), 1),
        (Range(0, 1), 1),
        (Range(above=0, finite=False), math.inf),
        (Range(least=0, below=1), 0.0),
        (Range(), -(10**400)),
    ],
)
def test_a_number_in_the_range_passes(limit, value):
    in_range("a.b", value, limit)


def test_fields_are_held_to_their_limits():
    assert Options(3).share == 0.5
    with pytest.raises(BadInput, match=r"^train\.steps: 0 must be at least 1$"):
        Options(0)
    with pytest.raises(
        BadInput, match=r"^train\.share: 2 must be above 0 and at most 1 \(1 is all\)$"
    ):
        Options(1, share=2)
    with pytest.raises(BadInput, match=r"^train\.name: 'cosin' is not one of cosine, linear; the"):
        Options(1, name="cosin")


def test_the_nearest_word_is_named():
    assert nearest("wdith", {"width": 1, "heads": 2}) == "width"
    assert nearest(None, ["one"]) == "one"  # the nearest of one, however far
    one_of("name", "a", ("a", "b"))
    with pytest.raises(BadInput, match="name: 3 is not one of a, b; the nearest is"):
        one_of("name", 3, ("a", "b"))
