"""Names of splits: what the field writes is recognised, and what only looks alike is not."""

import json
import os

import pytest

from moe_erc.checks import BadInput
from moe_erc.data import text_files
from moe_erc.data.split_names import SplitNames, held_out_name, split_word

# Divided in halves by hash, so many texts are all on one side once in 2**39 cases.
TEXTS = 40


def write(directory, files):
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return directory


def lines(word):
    return "".join(json.dumps({"text": f"{word} {number}"}) + "\n" for number in range(TEXTS))


def words_by_split(directory):
    found = {"train": set(), "validation": set()}
    for document in text_files.documents(directory, "text", 0.5):
        found[document.split].add(document.text.split()[0].decode())
    return found


@pytest.mark.parametrize("train, held_out", [
    ("train.jsonl", "validation.jsonl"),
    ("train-00000-of-00001.jsonl", "validation-00000-of-00001.jsonl"),
    ("data/train.jsonl", "data/validation.jsonl"),
    ("data/train-00000-of-00002.jsonl", "data/test-00000-of-00001.jsonl"),
    ("train_0.jsonl", "val_0.jsonl"),
    ("train0.jsonl", "valid1.jsonl"),
    ("train.01.jsonl", "dev.01.jsonl"),
    ("train/a.jsonl", "eval/a.jsonl"),
    ("Train/a.jsonl", "Validation/a.jsonl"),
    ("TRAIN.jsonl", "TEST.JSONL"),
    ("training/a.jsonl", "evaluation/a.jsonl"),
    ("trainset/a.jsonl", "devset/a.jsonl"),
    ("train_split/a.jsonl", "test_split/a.jsonl"),
    ("en/train/part/a.jsonl", "en/heldout/part/a.jsonl"),
    ("train/a.jsonl", "held_out/a.jsonl"),
    ("train/a.jsonl", "held-out.jsonl"),
    ("train/a.jsonl", "holdout.jsonl"),
    ("train (1).jsonl", "val (1).jsonl"),
    ("en/c4-train.00000-of-01024.json", "en/c4-validation.00000-of-00008.json"),
    ("Stories-GPT4-train.jsonl", "Stories-GPT4-valid.jsonl"),
    ("ptb.train.jsonl", "ptb.test.jsonl"),
])  # fmt: skip
def test_names_that_the_field_writes(train, held_out, tmp_path):
    write(tmp_path, {train: lines("SEEN"), held_out: lines("HELDOUT")})
    assert words_by_split(tmp_path) == {"train": {"SEEN"}, "validation": {"HELDOUT"}}


@pytest.mark.parametrize("name", [
    "training_notes", "trainspotting.txt", "testimony.txt", "validated.jsonl", "development.txt",
    "value.txt", "tests", "devices", "evaluation_of_x.txt", "contest.txt", "pretrain",
    "trainer_0.txt", "held.txt", "attest-1.txt",
])  # fmt: skip
def test_names_that_only_look_like_splits(name):
    assert SplitNames([name]).word(name) is None


def test_names_that_only_look_like_splits_are_divided_by_hash(tmp_path):
    write(
        tmp_path,
        {
            "training_notes/a.jsonl": lines("A"),
            "validated.jsonl": lines("B"),
            "night-test.jsonl": lines("C"),
        },
    )
    assert words_by_split(tmp_path) == {"train": {"A", "B", "C"}, "validation": {"A", "B", "C"}}


@pytest.mark.parametrize("path", [
    "train/validation.jsonl", "validation/train.jsonl", "train/en/dev-1/a.jsonl",
    "Train/Test/a.jsonl", "train/eval_of_1920.jsonl", "train_dev.jsonl", "train-validation.jsonl",
])  # fmt: skip
def test_a_path_with_a_held_out_name_is_never_trained_on(path, tmp_path):
    write(tmp_path, {"train/a.jsonl": lines("SEEN"), path: lines("HELDOUT")})
    assert words_by_split(tmp_path) == {"train": {"SEEN"}, "validation": {"HELDOUT"}}


def test_of_several_held_out_names_the_outermost_says_which():
    names = SplitNames([])
    assert names.decide(["data", "test", "validation.txt"]) == ("test", 2)
    assert names.decide(["validation", "test.txt"]) == ("validation", 1)
    assert names.decide(["train", "x", "dev"]) == ("dev", 3)
    assert names.decide(["x", "y"]) == (None, 0)


def test_the_held_out_split_is_the_most_fitting():
    assert held_out_name(["train", "test", "validation"]) == "validation"
    assert held_out_name(["train", "test", "dev"]) == "dev"
    assert held_out_name(["train", None]) is None
    assert split_word("val") == split_word("Valid-1.txt") == "validation"


def test_what_is_neither_and_a_second_held_out_set_are_counted(tmp_path):
    write(tmp_path, {
        "train/a.jsonl": lines("SEEN"),
        "validation/a.jsonl": lines("HELDOUT"),
        "test/a.jsonl": lines("LATER"),
        "test/b.jsonl": lines("LATER"),
        "README.txt": "about",
    })  # fmt: skip
    assert words_by_split(tmp_path) == {"train": {"SEEN"}, "validation": {"HELDOUT"}}
    account = text_files.survey(tmp_path, 0.5).account
    assert account.splits == "train is 'train/' (1 file), validation is 'validation/' (1 file)"
    assert account.ignored == {
        "files in another held-out split, 'test/'": 2,
        "text files whose names say no split": 1,
    }


@pytest.mark.parametrize("files, said", [
    ({"validation/a.txt": "x"},
     ["no training split (nothing is named so)", "'validation/' (1 file)"]),
    ({"validation/a.txt": "x", "b.txt": "y"}, ["no training split (nothing is named so)"]),
    ({"train/a.parquet": "x", "validation/a.txt": "x"},
     ["no training split (no text in 'train/')", "1 '.parquet'"]),
    ({"train/a.txt": "x", "validation/a.jsonl.zst": "x"},
     ["no held-out split (no text in 'validation/')", ".zst"]),
    ({"train/a.txt": "x", "validation/.a.txt": "x"},
     ["no held-out split", "1 hidden files or directories"]),
    ({"en/train/a.txt": "", "en/dev/a.txt": "x"},
     ["no training split (no text in 'en/train/')", "'en/dev/'"]),
    ({"train.parquet": "x", "validation.jsonl": "{}"},
     ["no training split (no text in 'train.parquet')"]),
    ({"train/a.parquet": "x", "README.txt": "about"},
     ["no training split (no text in 'train/')", "1 others"]),
    ({"validation/a.parquet": "x", "train/a.txt": "x", "test/a.txt": "y"}, ["no held-out split"]),
    ({"a.parquet": "x", "b.PARQUET": "x", "c.md": ""},
     ["no .txt or .jsonl file", "'.parquet'", "'.md'"]),
])  # fmt: skip
def test_a_split_that_is_empty_while_the_other_is_not(files, said, tmp_path):
    write(tmp_path, files)
    with pytest.raises(BadInput, match=r"^data\.sources: ") as error:
        text_files.survey(tmp_path, 0.02)
    assert all(word in str(error.value) for word in (str(tmp_path), *said)) and "\n" not in str(
        error.value
    )


@pytest.mark.parametrize("empty", ["train", "validation"])
def test_a_directory_of_no_files_is_an_empty_split(empty, tmp_path):
    other = {"train": "validation", "validation": "train"}[empty]
    write(tmp_path, {f"{other}/a.txt": "x"})
    (tmp_path / empty).mkdir()
    with pytest.raises(BadInput, match=f"no text in '{empty}/'"):
        text_files.survey(tmp_path, 0.02)


def test_training_text_alone_is_divided_by_hash(tmp_path):
    write(tmp_path, {"train/a.jsonl": lines("SEEN"), "train.py": "a script"})
    assert words_by_split(tmp_path) == {"train": {"SEEN"}, "validation": {"SEEN"}}
    splits = text_files.survey(tmp_path, 0.02).account.splits
    assert "none of them named as held out: 2 % of the documents are held out" in splits


def test_a_script_of_the_name_of_a_split_is_none(tmp_path):
    write(tmp_path, {"a.jsonl": lines("SEEN"), "test.py": "", "validation.md": ""})
    assert words_by_split(tmp_path)["train"] == {"SEEN"}


# ------------------------------------------------------------ links
def test_links_to_directories_and_files_are_followed(tmp_path):
    write(tmp_path / "elsewhere", {"a.jsonl": lines("SEEN"), "b.jsonl": lines("HELDOUT")})
    (tmp_path / "set").mkdir()
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "a.jsonl").symlink_to(tmp_path / "elsewhere" / "a.jsonl")
    (tmp_path / "set" / "train").symlink_to(tmp_path / "big")
    (tmp_path / "set" / "validation.jsonl").symlink_to("../elsewhere/b.jsonl")
    assert words_by_split(tmp_path / "set") == {"train": {"SEEN"}, "validation": {"HELDOUT"}}


@pytest.mark.parametrize("target", [".", "..", "loop", "../other"])
def test_a_loop_is_refused_by_name(target, tmp_path):
    write(tmp_path / "set", {"a.txt": "x", "other/b.txt": "y"})
    (tmp_path / "set" / "other" / "loop").symlink_to(target)
    with pytest.raises(
        BadInput, match=r"other/loop' is a link that leads back to itself or to a directory above"
    ) as error:
        text_files.survey(tmp_path / "set", 0.02)
    assert "\n" not in str(error.value)


def test_a_broken_link_of_the_name_of_a_split_is_an_empty_split(tmp_path):
    write(tmp_path, {"validation/a.txt": "x"})
    (tmp_path / "train").symlink_to(tmp_path / "gone")
    with pytest.raises(BadInput, match=r"no text in 'train'.*1 broken links"):
        text_files.survey(tmp_path, 0.02)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_text_that_is_held_out_under_one_name_is_not_trained_on_under_another(link, tmp_path):
    write(tmp_path, {"train/a.jsonl": lines("SEEN"), "validation/b.jsonl": lines("HELDOUT")})
    link(tmp_path / "validation" / "b.jsonl", tmp_path / "train" / "b.jsonl")
    assert words_by_split(tmp_path) == {"train": {"SEEN"}, "validation": {"HELDOUT"}}
    assert text_files.survey(tmp_path, 0.02).account.ignored == {
        "reached by another path as well": 1
    }


def test_everything_that_is_not_read_is_counted(tmp_path):
    write(tmp_path, {
        "a.txt": "x", ".hidden.txt": "x", ".cache/b.txt": "x", "c.parquet": "", "d.parquet": "",
        "e.jsonl.zst": "", "LICENSE": "", "metadata.json": "[]",
    })  # fmt: skip
    (tmp_path / "gone.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    survey = text_files.survey(tmp_path, 0.02)
    assert [file.parts[-1] for file, _ in survey.files] == ["a.txt"]
    # The three most frequent suffixes are named.
    assert dict(survey.account.ignored) == {
        "hidden files or directories": 2,
        "broken links": 1,
        "entries that are neither files nor directories": 1,
        "'.parquet' files": 2,
        "files without suffix": 1,
        "'.jsonl.zst' files": 1,
        "files of other suffixes": 1,
    }
