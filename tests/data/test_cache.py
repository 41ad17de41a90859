"""The cache: an entry appears complete or not at all, also where several processes derive it."""

import dataclasses
import json
from pathlib import Path

import pytest

from moe_erc.data import cache, streams
from moe_erc.data.text import prepare

PREPARE_SLOWLY = """
import json, sys, time
from moe_erc.data import streams
from moe_erc.data.text import DataConfig, prepare

def slowly(self, *arguments, append=streams._Writer.append):
    append(self, *arguments)
    self._file.flush()
    print("written", flush=True)
    time.sleep(0.01)

streams._Writer.append = slowly
prepare(DataConfig(**json.loads(sys.argv[1])))
"""


def token_files(config):
    return sorted(path.name for path in (Path(config.cache_dir) / "tokens").iterdir())


def content(corpus):
    return {
        split: {domain: stream.tokens_N.tolist() for domain, stream in found.items()}
        for split, found in corpus.streams.items()
    }


def test_text_is_tokenised_once(config, text_directory, monkeypatch):
    config = dataclasses.replace(config, sources=(str(text_directory),))
    first = prepare(config)
    monkeypatch.setattr(streams, "write", None)
    second = prepare(config)
    assert second.identity == first.identity and content(second) == content(first)


def test_a_killed_tokenisation_leaves_nothing_that_looks_finished(
    config, text_directory, killed_after
):
    config = dataclasses.replace(config, sources=(str(text_directory),))
    killed_after(PREPARE_SLOWLY, [json.dumps(dataclasses.asdict(config))], lines=100)
    (left,) = token_files(config)
    assert ".incomplete-" in left
    again, elsewhere = (
        prepare(config),
        prepare(dataclasses.replace(config, cache_dir=config.cache_dir + "2")),
    )
    assert content(again) == content(elsewhere) and again.identity == elsewhere.identity


def test_an_error_on_the_way_leaves_nothing(config, text_directory):
    with open(text_directory / "words.jsonl", "a") as file:
        file.write("not json\n")
    config = dataclasses.replace(config, sources=(str(text_directory),))
    with pytest.raises(ValueError, match=r"words\.jsonl:301 is not a JSON object"):
        prepare(config)
    assert token_files(config) == []


def test_the_loser_of_a_race_uses_the_winners_streams(config, text_directory, monkeypatch):
    config = dataclasses.replace(config, sources=(str(text_directory),))
    write = streams.write

    def overtaken(*arguments):
        write(*arguments)
        monkeypatch.setattr(streams, "write", write)
        prepare(config)  # another process finishes first

    monkeypatch.setattr(streams, "write", overtaken)
    corpus = prepare(config)
    (directory,) = token_files(config)
    assert (
        ".incomplete" not in directory
        and sum(stream.documents for split in corpus.streams.values() for stream in split.values())
        == 300
    )


def test_a_truncated_stream_is_named(config, two_documents):
    config = dataclasses.replace(config, sources=(two_documents,))
    prepare(config)
    (directory,) = (Path(config.cache_dir) / "tokens").iterdir()
    (directory / "train-text.bin").write_bytes(b"ab")
    with pytest.raises(
        ValueError,
        match=r"train-text\.bin' has 2 bytes and was written with 12; delete '.*tokens/two-",
    ):
        prepare(config)


def test_the_cache_directory_has_a_default(config, two_documents, tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_ERC_CACHE", str(tmp_path / "from_environment"))
    prepare(dataclasses.replace(config, sources=(two_documents,), cache_dir=""))
    assert (tmp_path / "from_environment" / "tokens").is_dir()


def test_a_directory_appears_with_all_it_holds(tmp_path):
    target = tmp_path / "deep" / "target"
    with cache.filling(target) as temporary:
        (temporary / "a").write_text("a")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["target"] and (
        target / "a"
    ).read_text() == "a"


def test_digests_do_not_depend_on_the_order_of_keys():
    assert (
        cache.digest({"a": 1, "b": [2]})
        == cache.digest({"b": [2], "a": 1})
        != cache.digest({"a": 1, "b": [3]})
    )
