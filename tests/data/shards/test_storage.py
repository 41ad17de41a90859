"""Where shards lie: local files, and object stores whose reads fail, stop early or end for good."""

import numpy as np
import pytest

from moe_erc.data.shards import storage
from moe_erc.data.shards.storage import Local, Remote, ShardError
from moe_erc.data.text import prepare, train_batches, validation_batches

T = 4


class Flaky:
    """An object store in memory of which some reads fail."""

    def __init__(self, store):
        self._store = store
        self.failures = []  # of the next reads: an exception, or how many bytes are left out
        self.reads = []

    def cat_file(self, path, start, end):
        self.reads.append((path, start, end))
        data = self._store.cat_file(path, start=start, end=end)
        if not self.failures:
            return data
        failure = self.failures.pop(0)
        if isinstance(failure, Exception):
            raise failure
        return data[: len(data) - failure]

    def __getattr__(self, name):
        return getattr(self._store, name)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(storage, "WAITS", (0, 0, 0))


@pytest.fixture
def flaky(bucket, tmp_path, monkeypatch):
    """A flaky store with 20 bytes in memory://bucket/a.npy."""
    (tmp_path / "up").mkdir()
    np.arange(10, dtype="<u2").tofile(tmp_path / "up" / "a.npy")
    store = Flaky(bucket(tmp_path / "up"))
    monkeypatch.setattr("fsspec.filesystem", lambda scheme: store)
    return store


def test_a_read_that_fails_is_repeated(flaky):
    flaky.failures = [OSError("reset"), ConnectionError("closed")]
    remote = Remote("memory", flaky)
    found = remote.read("memory://bucket/a.npy", 4, 8)
    np.testing.assert_array_equal(found.view("<u2"), [2, 3])
    assert len(flaky.reads) == 3


def test_a_read_that_ends_early_is_repeated_and_never_used(flaky):
    flaky.failures = [1, 4]
    remote = Remote("memory", flaky)
    assert len(remote.read("memory://bucket/a.npy", 4, 8)) == 4
    assert len(flaky.reads) == 3


def test_the_error_after_the_last_attempt_names_shard_and_range(flaky):
    flaky.failures = [OSError("no\nroute")] * 4
    with pytest.raises(ShardError) as error:
        Remote("memory", flaky).read("memory://bucket/a.npy", 4, 8)
    assert error.value.filename == "memory://bucket/a.npy"
    assert error.value.strerror == "bytes 4 to 8 cannot be read in 4 attempts (no route)"
    flaky.failures = [2] * 4
    with pytest.raises(ShardError, match=r"2 of 4 bytes came"):
        Remote("memory", flaky).read("memory://bucket/a.npy", 4, 8)


def test_an_object_that_is_gone_is_not_tried_again(flaky):
    remote = Remote("memory", flaky)
    with pytest.raises(ShardError, match="is no longer there"):
        remote.read("memory://bucket/b.npy", 4, 8)
    assert len(flaky.reads) == 1 and remote.size("memory://bucket/b.npy") is None


def test_an_object_that_may_not_be_read(flaky):
    flaky.failures = [PermissionError("no credentials")]
    with pytest.raises(ShardError, match=r"may not be read \(no credentials\)"):
        Remote("memory", flaky).read("memory://bucket/a.npy", 4, 8)
    assert len(flaky.reads) == 1


def test_a_local_file_that_was_cut_off_since(tmp_path):
    np.arange(10, dtype="<u2").tofile(tmp_path / "a.npy")
    with pytest.raises(ShardError, match=r"has 20 bytes now, and bytes 18 to 22 are needed"):
        Local().read(str(tmp_path / "a.npy"), 18, 22)
    with pytest.raises(ShardError, match=r"cannot be read \(No such file"):
        Local().read(str(tmp_path / "b.npy"), 0, 2)
    assert Local().size(str(tmp_path / "b.npy")) is None


@pytest.mark.parametrize("kind", ["flat", "numpy", "datatrove", "megatron"])
def test_an_object_store_gives_the_batches_of_the_disk(
    kind, write_shards, documents, shard_config, bucket, tmp_path
):
    source = write_shards(tmp_path / "bucket", kind, documents)
    bucket(tmp_path / "bucket")
    config = shard_config(source, validation_fraction=0.25)
    here = prepare(config)
    pattern = source.rpartition("/")[2]
    there = prepare(shard_config(f"tokens:memory://bucket/{pattern}", validation_fraction=0.25))
    # The place is no part of what is trained on.
    assert there.identity == here.identity
    for ours, theirs, _ in zip(
        train_batches(here, T, 3, 0), train_batches(there, T, 3, 0), range(20), strict=False
    ):
        np.testing.assert_array_equal(ours["inputs_BT"], theirs["inputs_BT"])
        np.testing.assert_array_equal(ours["targets_BT"], theirs["targets_BT"])
    for ours, theirs in zip(
        validation_batches(here, "bucket", T, 3),
        validation_batches(there, "bucket", T, 3),
        strict=True,
    ):
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_store_that_fails_for_good_ends_the_batches(
    write_shards, documents, shard_config, flaky, tmp_path
):
    corpus = prepare(shard_config("tokens:memory://bucket/a.npy"))
    batches = train_batches(corpus, T, 1, 0)
    flaky.failures = [OSError("down")] * 10_000
    with pytest.raises(ShardError, match="cannot be read in 4 attempts"):
        for _ in range(1000):
            next(batches)


def test_a_step_reads_its_own_rows_alone(shard_config, flaky):
    corpus = prepare(shard_config("tokens:memory://bucket/a.npy"))
    flaky.reads.clear()
    batches = train_batches(corpus, T, 2, 0, rows=[1])
    found = next(batches)["inputs_BT"]
    assert found.shape == (1, T)
    # Each read is of one window, and this process reads no row of another.
    assert {end - start for _, start, end in flaky.reads} == {2 * (T + 1)}
