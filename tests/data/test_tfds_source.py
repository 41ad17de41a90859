"""TFDS as a source: prepared directories, data sets by name, their splits and features."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe_erc.checks import BadInput
from moe_erc.data.sources import open_source


def texts(source, split=None):
    return [document.text for document in source.documents() if split in (None, document.split)]


class Splits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set with given splits, in the feature `body`."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, splits, **arguments):
        self._given = splits
        super().__init__(**arguments)

    def _info(self):
        features = tfds.features.FeaturesDict(
            {"body": tfds.features.Text(), "number": tfds.features.Scalar(np.int32)}
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(texts) for name, texts in self._given.items()}

    def _generate_examples(self, texts):
        yield from ((number, {"body": text, "number": number}) for number, text in enumerate(texts))


# TFDS would look here for checksums of downloads. There are none, and looking needs a package.
Splits.code_path = None


def prepared(directory, splits):
    builder = Splits(splits, data_dir=str(directory), file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
    return str(builder.data_path)


def test_a_prepared_directory_with_its_own_splits(config, tmp_path):
    path = prepared(tmp_path, {"train": ["a", "b"], "test": ["c"], "validation": ["d ☕"]})
    source = open_source(path, dataclasses.replace(config, text_key="body"))
    assert source.label == "splits" and source.count == 3
    assert sorted(texts(source, "train")) == [b"a", b"b"] and texts(source, "validation") == [
        "d ☕".encode()
    ]


def test_a_prepared_directory_without_validation_is_divided_by_hash(config, tmp_path):
    path = prepared(tmp_path, {"train": [f"text {number}" for number in range(100)]})
    source = open_source(
        path, dataclasses.replace(config, text_key="body", validation_fraction=0.5)
    )
    assert 25 < len(texts(source, "train")) < 75 and len(texts(source)) == 100


@pytest.mark.parametrize("name", ["c4/en", "wiki40b/en", "lm1b", "dolma"])
def test_tfds_names(config, name, tmp_path):
    # The mock yields str where real data sets yield bytes.
    with tfds.testing.mock_data(num_examples=5, data_dir=str(tmp_path)):
        source = open_source(name, config)
        found = texts(source)
    assert source.label == name.replace("/", "_") and len(found) == source.count == 5
    assert all(isinstance(text, bytes) and text for text in found)


def test_a_data_set_with_another_text_feature(config, tmp_path):
    with tfds.testing.mock_data(num_examples=2, data_dir=str(tmp_path)):
        assert (
            len(texts(open_source("pg19", dataclasses.replace(config, text_key="book_text")))) == 2
        )
        with pytest.raises(
            ValueError,
            match=r"data.text_key: 'pg19/0.1.1' has no text feature 'text'; "
            r"set it to one of .*'book_text'",
        ):
            open_source("pg19", config)


def test_a_data_set_that_cannot_be_prepared_here(config, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise RuntimeError("no network\nand a long story")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", offline)
    with pytest.raises(
        ValueError, match=r"'lm1b' is not prepared in '.*lm1b.*' .*\(no network and a long story\)"
    ) as error:
        open_source("lm1b", config)
    assert "\n" not in str(error.value)


def test_a_data_set_without_a_train_split(config, tmp_path):
    path = prepared(tmp_path, {"test": ["a"]})
    with pytest.raises(
        ValueError, match=r"'splits/1.0.0' has the splits \['test'\], none called 'train'"
    ):
        open_source(path, dataclasses.replace(config, text_key="body"))


def test_a_data_set_in_another_format(config, tmp_path):
    path = prepared(tmp_path, {"train": ["a"]})
    info = tmp_path / "splits" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="is in the tfrecord format; prepare it as array_record"):
        open_source(path, dataclasses.replace(config, text_key="body"))


@pytest.mark.parametrize(
    ("splits", "train", "validation"),
    [
        ({"train": ["a"], "train_small": ["b"], "dev": ["c"]}, [b"a"], [b"c"]),
        ({"train_clean": ["a"], "train_other": ["b"], "valid_clean": ["c"]}, [b"a", b"b"], [b"c"]),
        ({"train": ["a"], "eval": ["c"], "test": ["d"]}, [b"a"], [b"c"]),
    ],
)
def test_names_of_splits(config, tmp_path, splits, train, validation):
    source = open_source(prepared(tmp_path, splits), dataclasses.replace(config, text_key="body"))
    assert (sorted(texts(source, "train")), texts(source, "validation")) == (train, validation)


def test_splits_that_are_not_read_are_counted(config, tmp_path):
    path = prepared(tmp_path, {"train": ["a", "b"], "validation": ["c"], "test": ["d"] * 3})
    account = open_source(path, dataclasses.replace(config, text_key="body")).account
    assert account.splits == "train is the split 'train', validation is the split 'validation'"
    assert account.ignored == {"documents of the split 'test'": 3}


def empty(path, split):
    """Makes the metadata say that a split has no documents. TFDS itself does not write this."""
    info = Path(path) / "dataset_info.json"
    content = json.loads(info.read_text())
    for entry in content["splits"]:
        entry["shardLengths"] = [] if entry["name"] == split else entry["shardLengths"]
    info.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("splits", "emptied"),
    [
        ({"train": ["b"], "validation": ["a"]}, "train"),
        ({"train": ["a"], "dev": ["b"]}, "dev"),
        ({"train": ["a"]}, "train"),
    ],
)
def test_a_data_set_of_which_a_split_is_empty(config, tmp_path, splits, emptied):
    path = prepared(tmp_path, splits)
    empty(path, emptied)
    message = (
        rf"^data\.sources: 'splits/1.0.0' has no documents in its split '{emptied}' "
        rf"\(.*: .*'{emptied}': 0"
    )
    with pytest.raises(BadInput, match=message) as error:
        open_source(path, dataclasses.replace(config, text_key="body"))
    assert "\n" not in str(error.value)


def test_one_of_several_training_splits_may_be_empty(config, tmp_path):
    path = prepared(tmp_path, {"train_clean": ["a"], "train_other": ["b"], "dev": ["c"]})
    empty(path, "train_other")
    assert texts(open_source(path, dataclasses.replace(config, text_key="body"))) == [b"a", b"c"]


@pytest.mark.parametrize("content", [None, b"not records"])
def test_a_data_set_whose_files_are_gone_or_damaged(config, tmp_path, content):
    path = prepared(tmp_path, {"train": ["a"], "validation": ["b"]})
    (file,) = Path(path).glob("*validation*")
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(
        BadInput, match=r"^data\.sources: '.*splits/1.0.0' cannot be read \(.*\); prepare it again$"
    ):
        texts(open_source(path, dataclasses.replace(config, text_key="body")))


def test_the_feature_and_the_files_belong_to_the_identity(config, tmp_path):
    path = prepared(tmp_path, {"train": ["a", "b"], "validation": ["c"]})
    config = dataclasses.replace(config, text_key="body")
    first = open_source(path, config)
    assert open_source(path, config).identity == first.identity
    (record,) = Path(path).glob("*train*.array_record*")
    # The numbers of documents and bytes stay; the text might have changed.
    record.write_bytes(record.read_bytes())
    assert open_source(path, config).identity != first.identity
