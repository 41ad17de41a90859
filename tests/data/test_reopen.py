"""The text of an earlier run: read from the cache, or one line that says what has changed."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from moe_erc import resume
from moe_erc.data import origin
from moe_erc.data.text import prepare, reopen, streams_of


def earlier(config, corpus):
    """A checkpoint of a run with that corpus, read back."""
    data = json.loads(json.dumps(dataclasses.asdict(config)))
    meta = {
        "config": {"data": data, "train": {"batch_size": 8}},
        "data": json.loads(json.dumps(corpus.record)),
    }
    return resume.read(meta, 3)


def tokens(corpus):
    return {
        split: {name: stream.sha256 for name, stream in found.items()}
        for split, found in corpus.streams.items()
    }


def _install(monkeypatch, tree):
    for module in ("sources", "origin"):
        monkeypatch.setattr(f"moe_erc.data.{module}.installed_trees", lambda: (tree,))


@pytest.fixture
def upgraded(config, make_tree, tmp_path, monkeypatch):
    """A run on the embedded corpus of a library whose next release has more modules."""
    (older,) = make_tree(tmp_path / "old", modules=200)
    _install(monkeypatch, older)
    config = dataclasses.replace(config)
    corpus = prepare(config)
    (newer,) = make_tree(tmp_path / "new", modules=230)
    newer = newer._replace(version="2.0")
    _install(monkeypatch, newer)
    return config, corpus


def test_after_an_upgrade_the_run_reads_its_own_text(upgraded, capsys):
    config, corpus = upgraded
    found, changes = resume.open_text(earlier(config, corpus), config)
    assert tokens(found) == tokens(corpus) != tokens(prepare(config)) and changes == []
    assert found.identity == corpus.identity
    said = capsys.readouterr().out
    assert (
        "'embedded' has changed since the run was begun (package 1.0 -> 2.0)" in said
        and said.count("\n") == 1
    )


def test_after_an_upgrade_and_without_the_cache_the_libraries_are_named(upgraded):
    config, corpus = upgraded
    shutil.rmtree(Path(config.cache_dir) / "tokens")
    with pytest.raises(resume.TextGone) as error:
        resume.open_text(earlier(config, corpus), config)
    for words in (
        "data.sources",
        "package 1.0 -> 2.0",
        "install those versions",
        "--workdir",
        "resume.allow",
    ):
        assert words in str(error.value)
    found, (change,) = resume.open_text(earlier(config, corpus), config, ("data",))
    assert change.key == "data.sources" and tokens(found) == tokens(prepare(config))


def test_without_the_cache_an_unchanged_source_is_read_again(config, text_directory, capsys):
    config = dataclasses.replace(config, sources=(str(text_directory),))
    corpus = prepare(config)
    shutil.rmtree(config.cache_dir)
    found, changes = resume.open_text(earlier(config, corpus), config)
    assert tokens(found) == tokens(corpus) and changes == [] and not capsys.readouterr().out


def test_another_cache_is_looked_into_under_the_same_name(config, text_directory, tmp_path):
    config = dataclasses.replace(config, sources=(str(text_directory),))
    corpus = prepare(config)
    shutil.copytree(config.cache_dir, tmp_path / "elsewhere")
    shutil.rmtree(text_directory)
    moved = dataclasses.replace(config, cache_dir=str(tmp_path / "elsewhere"))
    assert tokens(reopen(json.loads(json.dumps(corpus.record)), moved)) == tokens(corpus)


def test_a_record_opens_nothing_outside_the_cache(config, text_directory, tmp_path):
    config = dataclasses.replace(config, sources=(str(text_directory),))
    record = json.loads(json.dumps(prepare(config).record))
    (inside,) = (Path(config.cache_dir) / "tokens").iterdir()
    shutil.copytree(inside, tmp_path / "outside")
    for place in ("../outside", str(tmp_path / "outside")):
        record["sources"][0]["directory"] = place
        assert reopen(record, config) is None


def test_other_streams_under_the_same_name_are_not_the_text(config, text_directory):
    config = dataclasses.replace(config, sources=(str(text_directory),))
    record = json.loads(json.dumps(prepare(config).record))
    assert streams_of(reopen(record, config).record) == streams_of(record)
    record["sources"][0]["streams"][0][1] = "0" * 64
    assert reopen(record, config) is None


def test_files_are_told_apart_by_name_size_and_time(tmp_path, monkeypatch):
    for name in ("a", "b", "c", "d", "e"):
        (tmp_path / f"{name}.txt").write_text(name)
    before = json.loads(json.dumps(origin.describe(str(tmp_path))))
    assert origin.compare(str(tmp_path), before) == ""
    (tmp_path / "a.txt").write_text("longer")
    for name in ("b", "c", "d", "e"):
        (tmp_path / f"{name}.txt").unlink()
    assert (
        origin.compare(str(tmp_path), before)
        == "4 files removed (b.txt, c.txt, d.txt, …), 1 file changed (a.txt)"
    )
    monkeypatch.setattr(origin, "MOST_FILES", 0)
    assert origin.compare(str(tmp_path), before) == "5 files then, 1 files of 6 bytes now"
    assert origin.compare(str(tmp_path / "gone"), before) == "it is no longer there"
