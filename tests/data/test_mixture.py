"""The mixture: exact shares, an even spread, and rows that processes share without overlap."""

import collections

import numpy as np
import pytest

from moe_erc.data.mixture import Mixture, whole_weights


def test_weights_become_the_smallest_whole_numbers():
    # The binary number 0.3 is not 3/10, but the decimal that was written is.
    assert whole_weights((0.3, 0.7)) == [3, 7]
    assert whole_weights((2, 4.0)) == [1, 2]
    assert whole_weights((np.float64(0.5), 0.125)) == [4, 1]
    assert whole_weights(()) == []


def test_weights_that_are_no_decimals_are_refused():
    with pytest.raises(
        ValueError,
        match=r"data.weights: \(0.333\d*, 1.0\) have too many digits .* such as \(2, 1\)",
    ):
        whole_weights((1 / 3, 1.0))


def test_one_period_by_hand():
    mixture = Mixture([1, 3], batch_size=4, rows=range(4))
    # The first source is drawn at time 1/2, the second at 1/6, 3/6 and 5/6. At 1/2 the first source
    # comes first.
    assert [mixture[row] for row in range(8)] == [
        (1, 0),
        (0, 0),
        (1, 1),
        (1, 2),
        (1, 3),
        (0, 1),
        (1, 4),
        (1, 5),
    ]


def test_every_period_gives_every_source_exactly_its_share():
    mixture = Mixture(whole_weights((0.2, 0.33, 0.47)), batch_size=10, rows=range(10))
    drawn = collections.Counter(mixture[row][0] for row in range(3 * 100))
    assert drawn == {0: 60, 1: 99, 2: 141}
    for source in range(3):
        windows = [
            window for chosen, window in map(mixture.__getitem__, range(300)) if chosen == source
        ]
        assert windows == list(range(len(windows)))  # none skipped, none twice


@pytest.mark.parametrize("rows", [range(4), (0, 1, 6, 7), (5,)])
def test_some_rows_are_those_rows_of_every_batch(rows):
    alone, some = Mixture([2, 3], batch_size=8, rows=range(8)), Mixture([2, 3], 8, rows)
    for step in range(5):
        mine = [some[step * len(rows) + number] for number in range(len(rows))]
        assert mine == [alone[step * 8 + row] for row in rows]


@pytest.mark.parametrize("start_row", [0, 3, 8, 10**12 + 7])
def test_rows_are_counted_on_from_any_start(start_row):
    alone, later = Mixture([2, 3], 8, range(8)), Mixture([2, 3], 5, (1, 4), start_row)
    for batch in range(4):
        rows = [start_row + 5 * batch + row for row in (1, 4)]
        assert [later[2 * batch], later[2 * batch + 1]] == [alone[row] for row in rows]
