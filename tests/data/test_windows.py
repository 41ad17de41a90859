"""Windows and batches of streams that count upwards: every token tells where it came from."""

import dataclasses
import itertools
import math
import types

import numpy as np
import pytest

from moe_erc.data.streams import Corpus, Stream
from moe_erc.data.windows import (
    Windows,
    count_windows,
    documents_per_window,
    train_batches,
    validation_batches,
)

T = 4


def take(batches, count):
    return list(itertools.islice(batches, count))


def starts(batches):
    """The first token of every row of some batches."""
    return np.concatenate([batch["inputs_BT"][:, 0] for batch in batches]).tolist()


@pytest.fixture
def corpus_of(counting_stream):
    """Makes a corpus with one validation stream of so many tokens."""
    return lambda tokens: Corpus(
        None, {"train": {}, "validation": {"a": counting_stream("s", 0, tokens)}}, {}, "identity"
    )


@pytest.mark.parametrize(("tokens", "windows"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (41, 10)])
def test_a_window_needs_one_token_more_than_it_predicts(counting_stream, tokens, windows):
    assert count_windows(counting_stream("s", 0, tokens), T) == windows


def test_windows_share_one_token(counting_stream):
    windows = Windows(counting_stream("s", 0, 10), T)
    found = [windows[i]["tokens"].tolist() for i in range(len(windows))]
    assert found == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]


def test_a_batch_predicts_the_next_token(counting_corpus):
    (batch,) = take(train_batches(counting_corpus, T, 6, seed=0), 1)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "inputs_BT": ((6, T), "int32"),
        "targets_BT": ((6, T), "int32"),
        "mask_BT": ((6, T), "bool"),
    }
    np.testing.assert_array_equal(batch["targets_BT"], batch["inputs_BT"] + 1)
    np.testing.assert_array_equal(batch["inputs_BT"], batch["inputs_BT"][:, :1] + np.arange(T))
    assert batch["mask_BT"].all()


def test_every_epoch_is_another_permutation_of_all_windows(counting_corpus):
    # "a" has 10 windows and "b" has 5; "short" has none. Three epochs are read in batches that do
    # not divide an epoch.
    drawn = starts(take(train_batches(counting_corpus, T, 9, seed=1), 5))
    epochs = [drawn[:15], drawn[15:30], drawn[30:]]
    everything = sorted([*range(0, 40, T), *range(1000, 1020, T)])
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and epochs[0] != everything


def test_the_seed_decides_the_order(counting_corpus):
    first, again, other = (
        starts(take(train_batches(counting_corpus, T, 5, seed=seed), 3)) for seed in (7, 7, 8)
    )
    assert first == again != other


def test_weights_are_honoured_exactly_and_sources_keep_their_own_epochs(weighted_corpus):
    # 1 : 3 over 5 batches of 8 gives 10 rows of "one", an epoch of its 10 windows, and 30 rows of
    # "two", 6 epochs of its 5 windows.
    drawn = starts(take(train_batches(weighted_corpus, T, 8, seed=0), 5))
    one, two = (
        [token for token in drawn if token < 1000],
        [token for token in drawn if token >= 1000],
    )
    assert (len(one), len(two)) == (10, 30)
    assert sorted(one) == list(range(0, 40, T))
    assert all(
        sorted(two[epoch : epoch + 5]) == list(range(1000, 1020, T)) for epoch in range(0, 30, 5)
    )
    assert all(
        sum(token < 1000 for token in starts([batch])) == 2
        for batch in take(train_batches(weighted_corpus, T, 8, seed=0), 5)
    )


@pytest.mark.parametrize("corpus_name", ["counting_corpus", "weighted_corpus"])
@pytest.mark.parametrize("step", [1, 7, 20])
def test_resuming_at_a_step_gives_its_batch(request, corpus_name, step):
    corpus = request.getfixturevalue(corpus_name)
    uninterrupted = take(train_batches(corpus, T, 4, seed=3), step + 3)
    for expected, resumed in zip(
        uninterrupted[step:], train_batches(corpus, T, 4, seed=3, start_row=4 * step), strict=False
    ):
        for name in expected:
            np.testing.assert_array_equal(resumed[name], expected[name])


def test_resuming_reads_only_what_it_returns(counting_corpus, monkeypatch):
    read = []
    getitem = Windows.__getitem__
    monkeypatch.setattr(
        Windows, "__getitem__", lambda self, index: read.append(index) or getitem(self, index)
    )
    take(train_batches(counting_corpus, T, 4, seed=3, start_row=4 * 10**9), 1)
    # The batch and the prefetched ones after it are read, not the 10**9 batches before it.
    assert 4 <= len(read) <= 4 * 16


@pytest.mark.parametrize("corpus_name", ["counting_corpus", "weighted_corpus"])
@pytest.mark.parametrize("shares", [[(0, 1, 2, 3), (4, 5, 6, 7)], [(0, 1, 6, 7), (2, 3), (4, 5)]])
def test_processes_read_the_rows_of_one_batch_without_overlap(request, corpus_name, shares):
    corpus = request.getfixturevalue(corpus_name)
    alone = take(train_batches(corpus, T, 8, seed=5, start_row=16), 6)
    for rows in shares:
        shared = take(train_batches(corpus, T, 8, 5, start_row=16, rows=rows), 6)
        for mine, expected in zip(shared, alone, strict=True):
            for name in expected:
                np.testing.assert_array_equal(mine[name], expected[name][list(rows)])


@pytest.mark.parametrize("corpus_name", ["counting_corpus", "weighted_corpus"])
@pytest.mark.parametrize("sizes", [(8, 4), (4, 8), (6, 5, 7, 1, 3), (1, 9)])
def test_batches_of_any_size_go_on_where_the_last_one_stopped(request, corpus_name, sizes):
    # Two batches of each size are read in turn, over several epochs of the 15 windows. No row is
    # read twice, and none is left out.
    corpus = request.getfixturevalue(corpus_name)
    read, drawn = 0, []
    for size in (*sizes, *sizes):
        drawn += starts(take(train_batches(corpus, T, size, seed=3, start_row=read), 2))
        read += 2 * size
    assert drawn == starts(take(train_batches(corpus, T, 1, seed=3), read))


def test_the_row_is_given_by_name_so_that_a_step_is_not_taken_for_it(counting_corpus):
    with pytest.raises(TypeError, match="positional"):
        train_batches(counting_corpus, T, 4, 3, 6)


@pytest.mark.parametrize("corpus_name", ["counting_corpus", "weighted_corpus"])
def test_processes_share_batches_of_another_size_from_any_row_on(request, corpus_name):
    corpus = request.getfixturevalue(corpus_name)
    alone = starts(take(train_batches(corpus, T, 6, seed=3, start_row=7), 5))
    shares = [
        starts(take(train_batches(corpus, T, 6, 3, start_row=7, rows=rows), 5))
        for rows in ((0, 1, 4), (2, 3, 5))
    ]
    for batch in range(5):
        expected = alone[6 * batch : 6 * batch + 6]
        assert shares[0][3 * batch : 3 * batch + 3] == [expected[row] for row in (0, 1, 4)]
        assert shares[1][3 * batch : 3 * batch + 3] == [expected[row] for row in (2, 3, 5)]


@pytest.mark.parametrize("tokens", [2, 4, 5, 6, 23, 25])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_validation_covers_every_target_once_in_batches_of_one_shape(corpus_of, tokens, batch_size):
    batches = list(validation_batches(corpus_of(tokens), "a", T, batch_size))
    assert {batch[name].shape for batch in batches for name in batch} == {(batch_size, T)}
    counted = np.concatenate([batch["targets_BT"][batch["mask_BT"]] for batch in batches])
    # Nothing precedes the first token, so it is not a target.
    assert counted.tolist() == list(range(1, tokens))
    for batch in batches:
        np.testing.assert_array_equal(
            batch["inputs_BT"][batch["mask_BT"]] + 1, batch["targets_BT"][batch["mask_BT"]]
        )
    assert len(batches) == math.ceil((tokens - 1) / T / batch_size)


def test_a_limit_spreads_windows_evenly(corpus_of):
    # The windows of 25 targets start at 0, 4, …, 24; the last has one target. Three of these seven
    # windows are number 0, 7 // 3 and 14 // 3.
    batches = list(validation_batches(corpus_of(26), "a", T, 2, limit=3))
    assert [batch["inputs_BT"][:, 0].tolist() for batch in batches] == [[0, 8], [16, 0]]
    assert [batch["mask_BT"].sum() for batch in batches] == [8, 4]
    everything = list(validation_batches(corpus_of(26), "a", T, 2))
    for limit in (0, None, 7, 100):
        limited = list(validation_batches(corpus_of(26), "a", T, 2, limit))
        assert starts(limited) == starts(everything)


def test_an_unknown_domain_is_refused_at_the_call(counting_corpus):
    with pytest.raises(
        ValueError,
        match=r"no validation text in domain 'b'; the domains that have some are \['a'\]",
    ):
        validation_batches(counting_corpus, "b", T, 2)


@pytest.fixture
def ending_corpus():
    """A corpus with windows of T = 4; its documents end with token 9, and one of them is empty."""
    tokens_N = np.array([9, 1, 2, 9, 9, 3, 4, 5, 6, 7, 8, 9, 1, 9], "<u2")
    stream = Stream("s", tokens_N, 9, 5, "sha256")
    tokenizer = types.SimpleNamespace(eos_id=9)
    streams = {"train": {"a": stream}, "validation": {"a": stream}}
    return Corpus(tokenizer, streams, {}, "identity", attend_across_documents=False)


SEGMENTS = {  # by the first two tokens of a window
    (9, 1): [0, 1, 1, 1],
    (9, 3): [0, 1, 1, 1],
    (6, 7): [0, 0, 0, 0],
}


def test_documents_of_a_window_are_numbered_and_end_with_their_end(ending_corpus):
    first, second, third, last = validation_batches(ending_corpus, "a", T, 1)
    assert [batch["inputs_BT"][0].tolist() for batch in (first, second, third)] == [
        [9, 1, 2, 9], [9, 3, 4, 5], [6, 7, 8, 9],
    ]  # fmt: skip
    for batch in (first, second, third, last):
        assert batch["segments_BT"].dtype == np.int32
        # The last window holds 1, the end of the document, and padding.
        expected = (
            SEGMENTS[tuple(batch["inputs_BT"][0, :2].tolist())]
            if batch is not last
            else [0, 0, 1, 1]
        )
        assert batch["segments_BT"][0].tolist() == expected
    assert last["mask_BT"][0].tolist() == [True, False, False, False]  # 1, before the last end
    # The end of a document predicts the next token and is counted, so the targets are those of
    # attention across documents.
    across = validation_batches(
        dataclasses.replace(ending_corpus, attend_across_documents=True), "a", T, 1
    )
    for within, other in zip((first, second, third, last), across, strict=True):
        assert set(within) - set(other) == {"segments_BT"}
        for name in other:
            np.testing.assert_array_equal(within[name], other[name])


def test_training_batches_number_documents_too_in_whatever_rows_are_read(ending_corpus):
    for batch in take(train_batches(ending_corpus, T, 3, seed=0), 4):
        for inputs, segments in zip(
            batch["inputs_BT"].tolist(), batch["segments_BT"].tolist(), strict=True
        ):
            assert segments == SEGMENTS[tuple(inputs[:2])]
    alone = take(train_batches(ending_corpus, T, 4, seed=0), 3)
    shared = take(train_batches(ending_corpus, T, 4, 0, rows=(1, 3)), 3)
    for mine, expected in zip(shared, alone, strict=True):
        np.testing.assert_array_equal(mine["segments_BT"], expected["segments_BT"][[1, 3]])


def test_documents_of_a_window_on_average(ending_corpus, weighted_corpus):
    # 14 tokens have 5 ends. An end among the first 3 tokens of a window begins another document in
    # that window.
    assert documents_per_window(ending_corpus, T) == pytest.approx(1 + 3 * 5 / 14)
    # The 2 streams of "one" hold 45 tokens and 2 documents, that of "two" 21 tokens and 1 document.
    # They are drawn 1 : 3.
    assert documents_per_window(weighted_corpus, T) == pytest.approx(
        1 + 3 * (2 / 45 / 4 + 1 / 21 * 3 / 4)
    )
