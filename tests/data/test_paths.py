"""Paths as users write them: one meaning everywhere, or one line of refusal."""

import os
from pathlib import Path

import pytest

from moe_erc.checks import BadInput
from moe_erc.data import cache, paths, sources, tokenizer
from moe_erc.data.config import DataConfig
from moe_erc.evaluation.tasks import load_tasks
from moe_erc.hf import inspect, olmoe, shard_writer, tokenizer_files
from moe_erc.runs import open_run
from moe_erc.training.checkpoint import prepare_directory
from tests import script

REFUSED = [
    ("", "is no path"),
    ("a\\b", "separator"),
    ("a\nb", "control characters"),
    ("a\0b", "control characters"),
    (os.fsdecode(b"a\xff"), "UTF-8"),
    ("~nobody_of_this_name/x", "no user 'nobody_of_this_name'"),
    ("file:///tmp/x", "without a scheme"),
    ("http://host/x", "without a scheme"),
    ("s3://bucket/x", "without a scheme"),
    ("gs:/bucket/x", "without a scheme"),
]
TAKEN = (
    "lr[1e-3]",
    "a*b",
    "a?b",
    "$HOME",
    "%41",
    "#x",
    "a:b",
    " a ",
    "-a",
    "ü",
    "a,b",
    "{a}",
    "'a'",
    "a~",
    "file:",
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_the_home_directory_and_the_current_one(home):
    for read in (paths.absolute, paths.local):
        assert str(read("~/run")) == str(home / "run")
        assert str(read("run/")) == str(home.parent / "run")
        # Where run is a link, this lies beside its target.
        assert str(read("../run")) == str(home.parent / ".." / "run")
        assert str(read("./~")) == str(home.parent / "~")
    assert str(paths.absolute("gs://bucket/run")) == "gs://bucket/run"


@pytest.mark.parametrize("name", TAKEN)
def test_other_characters_stand_for_themselves(name, home):
    for read in (paths.absolute, paths.local):
        assert str(read(name)) == str(home.parent / name)
        assert str(read(read(name))) == str(read(name))


@pytest.mark.parametrize(("text", "words"), REFUSED, ids=[repr(text) for text, _ in REFUSED])
def test_what_cannot_be_used_is_refused_in_one_line(text, words):
    for read in (paths.absolute, paths.local):
        with pytest.raises(BadInput) as error:
            read(text)
        assert words in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_bucket_has_a_name_and_no_patterns_and_is_no_place_of_this_machine():
    for text in ("gs://", "gs:///run", "gs://bucket/lr[1e-3]", "gs://bucket/a*", "gs://bucket/a?"):
        with pytest.raises(BadInput):
            paths.absolute(text)
    with pytest.raises(BadInput, match="a path of this machine"):
        paths.local("gs://bucket/run")


def test_the_current_directory_counts_too(tmp_path, monkeypatch):
    (tmp_path / "a\\b").mkdir()
    monkeypatch.chdir(tmp_path / "a\\b")
    with pytest.raises(BadInput, match="separator"):
        paths.absolute("run")


def test_a_pattern_is_looked_for_below_a_literal_path(tmp_path):
    for name in ("lr[1]", "lr1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part_0").touch()
    found = list((paths.absolute(tmp_path) / "lr[1]").glob("part_*"))
    assert [str(path) for path in found] == [str(tmp_path / "lr[1]" / "part_0")]
    assert type(found[0] / "x") is type(found[0].parent) is paths.LiteralPath


def test_several_are_separated_by_commas_unless_one_is_there(tmp_path):
    assert paths.several("a,b") == ["a", "b"] and paths.several("a") == ["a"]
    (tmp_path / "lr=1,bs=8").mkdir()
    assert paths.several(f"{tmp_path}/lr=1,bs=8") == [f"{tmp_path}/lr=1,bs=8"]


def test_a_file_is_shown_to_be_writable_before_work_is_done_for_it(tmp_path):
    assert paths.writable_file(tmp_path / "new" / "file") == tmp_path / "new" / "file"
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").touch()
    for path in (tmp_path / "new", tmp_path / "file" / "below"):
        with pytest.raises(BadInput, match="cannot write"):
            paths.writable_file(path)


def data_config(**changes):
    values = {
        "sources": ("embedded",), "weights": (), "tokenizer": "bytes", "text_key": "text",
        "validation_fraction": 0.1, "sequence_length": 8, "cache_dir": "",
    }  # fmt: skip
    return DataConfig(**values | changes)


def test_every_reader_of_a_path_knows_the_home_directory(home):
    (home / "texts").mkdir(parents=True)
    (home / "texts" / "a.txt").write_text("text")
    (home / "tokenizer.json").write_text("{}")
    assert cache.directory_of("~/cache") == home / "cache"
    assert sources.open_source("~/texts", data_config()).label == "texts"
    assert shard_writer.free_path("~/export") == home / "export"
    assert tokenizer_files.tokenizer_of("~", "bytes") == str(home / "tokenizer.json")
    readers = {
        "is not a tokenizer.json": lambda: tokenizer.load("~/tokenizer.json"),
        f"{home}/no": lambda: inspect.open_moe("~/no"),
        f"{home}/none": lambda: olmoe.open_olmoe("~/none", None, None),
        f"{home}/run": lambda: open_run("~/run"),
        f"{home}/tasks": lambda: load_tasks(["x"], "~/tasks"),
    }
    for words, reader in readers.items():
        with pytest.raises((BadInput, OSError), match=words):
            reader()
    prepare_directory("~/run/checkpoints").close()
    assert (home / "run" / "checkpoints").is_dir() and not Path("~").exists()


def test_a_refused_workdir_is_one_line_before_anything_is_compiled(tmp_path):
    for name, words in (("a\\b", "separator"), ("a\nb", "control characters")):
        arguments = ["--config=configs/erc.py:debug", f"--workdir={tmp_path / name}"]
        code, printed = script.run(
            "train.py", arguments, tmp_path / "out", environment={"JAX_LOG_COMPILES": True}
        )
        last = printed.splitlines()[-1]
        assert (
            code == 2
            and last.startswith("error: ")
            and words in last
            and "Compiling" not in printed
        ), printed
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
