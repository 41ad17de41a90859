"""The data block is checked where it is made."""

import dataclasses

import pytest

from moe_erc.data.config import DataConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": ()}, "data.sources: () is not a list of sources"),
        ({"sources": "embedded"}, "data.sources: 'embedded' is not a list"),
        ({"sources": ("a", "a")}, "data.sources: 'a' is empty or listed twice in ('a', 'a')"),
        ({"sources": ("",)}, "data.sources: '' is empty"),
        ({"weights": (1.0, 2.0)}, "data.weights: 2 weights for 1 data.sources"),
        ({"weights": (0.0,)}, "data.weights: 0.0 must be positive (give each source"),
        ({"weights": (float("inf"),)}, "data.weights: inf must be finite and positive"),
        (
            {"validation_fraction": 1.0},
            "data.validation_fraction: 1.0 must be at least 0 and below 1",
        ),
        ({"sequence_length": 0}, "data.sequence_length: 0 must be at least 1"),
    ],
)
def test_a_configuration_is_checked_where_it_is_made(config, fields, message):
    with pytest.raises(ValueError) as error:
        DataConfig(**(dataclasses.asdict(config) | fields))
    assert message in str(error.value) and "\n" not in str(error.value)
