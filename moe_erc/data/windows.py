"""Batches of fixed windows, addressed by one integer.

Window i of a stream has the tokens [i T, i T + T]. Its inputs are all but the last token, and its
targets are all but the first. Every target is in exactly one window.

A training batch is a pure function of (corpus, seed, rows read before it). A resumed run therefore
reads nothing again, also with batches of another size. A batch has the same rows in the same order
whether one process reads it or several processes read parts of it.
"""

import concurrent.futures
import functools
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np

from moe_erc.checks import BadInput
from moe_erc.data.mixture import Mixture
from moe_erc.data.shards.tokens import ShardTokens
from moe_erc.data.streams import Corpus, Stream

# Batches are prepared while the device computes.
_READING = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
# Of an object store so many rows are read at once, and so many batches ahead.
_REMOTE_ROWS = 64
_REMOTE_BATCHES = 2
# That are shuffled together: grain computes its permutation in 32 bits and stores nothing. Beyond
# them it would leave windows out without a word.
MOST_WINDOWS = 2**32


def count_windows(stream: Stream, sequence_length: int) -> int:
    """The number of full windows in a stream.

    A window's last target is the first input of the next.
    """
    return max(len(stream.tokens_N) - 1, 0) // sequence_length


class Windows:
    """The full windows of a stream, with random access.

    A window is {"tokens": (T + 1,) int32}. With `eos_id` it also has "ends": (T,) bool, whether
    each input is the last of its document.
    """

    def __init__(self, stream: Stream, sequence_length: int, eos_id: int | None = None):
        self._stream = stream
        self._length = sequence_length
        self._eos_id = eos_id
        self._count = count_windows(stream, sequence_length)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return _window(self._stream, int(index) * self._length, self._length, self._eos_id)


def train_batches(
    corpus: Corpus,
    sequence_length: int,
    batch_size: int,
    seed: int,
    *,
    start_row: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """The endless training batches from `start_row` on, shuffled anew in every epoch.

    The windows of a source, of all its domains, are read in a random permutation, and then in
    another one.

    Args:
      corpus: the token streams
      sequence_length: tokens of a window, T
      batch_size: rows of a batch, of all processes together
      seed: of the permutations
      start_row: how many rows (windows) all batches before have had together. It need not be a
        multiple of `batch_size`, because those batches may have had other sizes. It must be given
        by name, so that nobody passes a number of steps.
      rows: the rows of each batch that this process reads; None reads all
    """
    rows = range(batch_size) if rows is None else rows
    train = corpus.streams["train"].values()
    # Without weights all streams are one group, in proportion to their sizes.
    groups = [list(train)]
    weights = [1]
    if corpus.weights:
        weights = list(corpus.weights.values())
        groups = []
        for source in corpus.weights:
            groups.append([stream for stream in train if stream.source == source])
    shuffled = []
    eos_id = _document_end(corpus)
    for position, group in enumerate(groups):
        shuffled.append(_shuffled(group, sequence_length, eos_id, (seed, position)))
    mixture = Mixture(weights, batch_size, rows, start_row)
    windows = grain.MapDataset.select_from_datasets(shuffled, mixture)
    if not any(_is_remote(stream) for stream in train):
        batches = windows.batch(len(rows)).map(_inputs_and_targets)
        return iter(batches.to_iter_dataset(_READING))
    # A read waits for the latency of the store, so that the rows of a batch are read side by side.
    ahead = max(_REMOTE_BATCHES * len(rows), _REMOTE_ROWS)
    reading = grain.ReadOptions(num_threads=_REMOTE_ROWS, prefetch_buffer_size=ahead)
    return iter(windows.to_iter_dataset(reading).batch(len(rows)).map(_inputs_and_targets))


def validation_batches(
    corpus: Corpus, domain: str, sequence_length: int, batch_size: int, limit: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Every target of a domain's validation stream once, in order, in batches of one shape.

    Padding has mask False. `limit` is the largest number of windows, which are then spread evenly
    over the stream; 0 and None mean all.
    """
    streams = corpus.streams["validation"]
    if domain not in streams:
        raise BadInput(
            f"no validation text in domain '{domain}'; "
            f"the domains that have some are {sorted(streams)}"
        )
    return _validation_batches(
        streams[domain], sequence_length, batch_size, limit, _document_end(corpus)
    )


def documents_per_window(corpus: Corpus, sequence_length: int) -> float:
    """How many documents a training window has on average, whole or in part."""
    train = corpus.streams["train"].values()
    weights = corpus.weights or {None: 1}
    expected = 0.0
    for source, weight in weights.items():
        streams = [stream for stream in train if source in (None, stream.source)]
        documents = sum(stream.documents for stream in streams)
        tokens = sum(len(stream.tokens_N) for stream in streams)
        ends_per_token = documents / tokens
        share = weight / sum(weights.values())
        expected += share * (1 + (sequence_length - 1) * ends_per_token)
    return expected


def _validation_batches(
    stream: Stream,
    sequence_length: int,
    batch_size: int,
    limit: int | None,
    eos_id: int | None,
) -> Iterator[dict[str, np.ndarray]]:
    total = -(-(len(stream.tokens_N) - 1) // sequence_length)
    kept = min(limit or total, total)
    starts = np.arange(kept) * total // max(kept, 1) * sequence_length
    for first in range(0, kept, batch_size):
        mask_BT = np.zeros((batch_size, sequence_length), bool)
        windows = {"tokens": np.zeros((batch_size, sequence_length + 1), np.int32)}
        if eos_id is not None:
            windows["ends"] = np.zeros_like(mask_BT)
        of_batch = starts[first : first + batch_size].tolist()
        for row, window in enumerate(_several(stream, of_batch, sequence_length, eos_id)):
            mask_BT[row, : len(window["tokens"]) - 1] = True
            for name, values in window.items():
                windows[name][row, : len(values)] = values
        yield _inputs_and_targets(windows) | {"mask_BT": mask_BT}


def _shuffled(
    streams: list[Stream], sequence_length: int, eos_id: int | None, entropy: tuple[int, int]
) -> grain.MapDataset:
    """All windows of some streams, epoch after epoch, each epoch a new permutation."""
    sets = []
    for stream in streams:
        if count_windows(stream, sequence_length):
            sets.append(grain.MapDataset.source(Windows(stream, sequence_length, eos_id)))
    # Each source has a permutation of its own.
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    return grain.MapDataset.concatenate(sets).shuffle(seed).repeat()


def _document_end(corpus: Corpus) -> int | None:
    """The token at which attention ends, or None if attention crosses documents."""
    return None if corpus.attend_across_documents else corpus.tokenizer.eos_id


def _window(stream: Stream, start: int, length: int, eos_id: int | None) -> dict[str, np.ndarray]:
    """The window of a stream that begins at a token; the last window may be shorter.

    It is {"tokens", "ends"} as `Windows` has it.
    """
    # Sources may have tokens of several types.
    tokens = stream.tokens_N[start : start + length + 1].astype(np.int32)
    if eos_id is None:
        return {"tokens": tokens}
    inputs = tokens[:length]
    ends = inputs == eos_id if stream.ends is None else stream.ends(start, inputs)
    return {"tokens": tokens, "ends": ends}


def _several(
    stream: Stream, starts: Sequence[int], length: int, eos_id: int | None
) -> list[dict[str, np.ndarray]]:
    """The windows of a stream that begin at some tokens, of an object store read side by side."""
    read = functools.partial(_window, stream, length=length, eos_id=eos_id)
    if not _is_remote(stream):
        return [read(start) for start in starts]
    with concurrent.futures.ThreadPoolExecutor(_REMOTE_ROWS) as pool:
        return list(pool.map(read, starts))


def _is_remote(stream: Stream) -> bool:
    return isinstance(stream.tokens_N, ShardTokens) and stream.tokens_N.is_remote


def _inputs_and_targets(windows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Windows of T + 1 tokens as T predictions each, none of which is masked.

    If it is known where their documents end, these are numbered.
    """
    window_BT = windows["tokens"]
    batch = {
        "inputs_BT": window_BT[:, :-1],
        "targets_BT": window_BT[:, 1:],
        "mask_BT": np.ones_like(window_BT[:, 1:], bool),
    }
    if "ends" in windows:
        batch["segments_BT"] = _number_documents(windows["ends"])
    return batch


def _number_documents(ends_BT: np.ndarray) -> np.ndarray:
    """(B, T) int32: how many documents ended in the window before each token.

    The last token of a document, which is its end-of-document token where there is one, belongs to
    it and predicts the first token of the next document. That target is not masked, so that a loss
    has the same targets whether attention crosses documents or not.
    """
    return np.cumsum(ends_BT, axis=1, dtype=np.int32) - ends_BT
