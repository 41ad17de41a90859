"""Tokenizers: every text comes back, every id decodes, and identity follows the ids."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moe_erc
from moe_erc.checks import BadInput
from moe_erc.data import bpe, tokenizer

TEXTS = [
    "the cat sat on the mat",
    "naïve café ☕",
    "<|endoftext|> is a token",
    "the cat, the hat",
] * 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    bpe.save(bpe.train(TEXTS, 300), path)
    return path


def test_bytes_are_their_own_ids():
    byte_tokenizer = tokenizer.load("bytes")
    assert (byte_tokenizer.vocab_size, byte_tokenizer.eos_id) == (257, 256)
    assert byte_tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert byte_tokenizer.encode(b"\xff").tolist() == [255]
    assert byte_tokenizer.decode([97, 0xC3, 0xA9]) == "aé"


def test_bytes_decode_anything():
    # An incomplete character is replaced. The end of a document and the padding of a vocabulary of
    # 512 are dropped.
    assert tokenizer.load("bytes").decode(np.array([0xC3, 256, 97, 511], np.int32)) == "\ufffda"


@pytest.mark.parametrize("text", TEXTS[:4])
def test_bpe_returns_every_text(trained, text):
    bpe_tokenizer = tokenizer.load(str(trained))
    assert bpe_tokenizer.vocab_size <= 300
    ids = bpe_tokenizer.encode(text)
    assert len(ids) < len(text.encode()) and ids.max() < bpe_tokenizer.vocab_size
    assert bpe_tokenizer.decode(ids) == text
    assert bpe_tokenizer.encode(text.encode()).tolist() == ids.tolist()


def test_text_that_spells_the_end_of_a_document_does_not_end_it(trained):
    bpe_tokenizer = tokenizer.load(str(trained))
    assert bpe_tokenizer.eos_id not in bpe_tokenizer.encode("a<|endoftext|>b")


def test_bpe_decodes_anything(trained):
    bpe_tokenizer = tokenizer.load(str(trained))
    cat = bpe_tokenizer.encode("the cat").tolist()
    assert bpe_tokenizer.decode([bpe_tokenizer.eos_id, *cat, 10_000, -1]) == "the cat"
    assert isinstance(bpe_tokenizer.decode(range(400)), str)


def test_training_is_deterministic_and_identity_follows_the_vocabulary(trained, tmp_path):
    bpe.save(bpe.train(TEXTS, 300), tmp_path / "same.json")
    bpe.save(bpe.train(TEXTS, 280), tmp_path / "smaller.json")
    assert (tmp_path / "same.json").read_bytes() == trained.read_bytes()
    identities = [
        tokenizer.load(str(path)).identity
        for path in (trained, tmp_path / "same.json", tmp_path / "smaller.json")
    ]
    assert identities[0] == identities[1] != identities[2]
    assert tokenizer.load("bytes").identity not in identities


def test_saving_leaves_only_the_file(trained, tmp_path):
    output = tmp_path / "tokenizer.json"
    output.write_text("old")
    bpe.save(bpe.train(TEXTS, 260), output)
    assert [path.name for path in tmp_path.iterdir()] == [
        "tokenizer.json"
    ] and output.read_text() != "old"


def test_bpe_trains_on_training_documents_alone(config, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text("seen")
    (tmp_path / "text" / "validation.txt").write_text("unseen")
    config = dataclasses.replace(config, sources=(str(tmp_path / "text"),))
    assert list(bpe.training_texts(config)) == ["seen"]


CONFIG = """
from configs import base

def get_config(size=""):
    config = base.get_config(size)
    config.data.sources = ({source!r},)
    config.data.validation_fraction = 0.0
    config.data.sequence_length = 4
    return config
"""


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [("text", 0, "260 tokens; use them with --config.data"), ("absent", 2, "no such directory")],
)
def test_the_command_trains_or_says_why_not(tmp_path, source, code, said):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the cat sat on the mat with the hat")
    (tmp_path / "config.py").write_text(CONFIG.format(source=str(tmp_path / source)))
    flags = [
        f"--config={tmp_path / 'config.py'}:debug",
        "--vocab_size=260",
        f"--output={tmp_path / 'tokenizer.json'}",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(moe_erc.__file__).parents[1])}
    command = [sys.executable, "-m", "moe_erc.train_tokenizer", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (
        done.returncode == code
        and said in done.stdout + done.stderr
        and "Traceback" not in done.stderr
    )
    assert (tmp_path / "tokenizer.json").exists() == (code == 0)


def test_errors_are_one_line_and_name_the_value(trained, tmp_path, monkeypatch):
    (tmp_path / "bad.json").write_text("{")
    without_end = tmp_path / "without_end.json"
    without_end.write_text(trained.read_text().replace("<|endoftext|>", "<|other|>"))
    cases = {
        "missing.json": (BadInput, "no such file 'missing.json'; give 'bytes'"),
        str(tmp_path / "bad.json"): (ValueError, "bad.json' is not a tokenizer.json"),
        str(without_end): (ValueError, "without_end.json' has no end-of-document token"),
    }
    for spec, (kind, message) in cases.items():
        with pytest.raises(kind, match=r"^data\.tokenizer: ") as error:
            tokenizer.load(spec)
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="--vocab_size: 256 must be at least 257"):
        bpe.train(TEXTS, 256)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'moe_erc\[tokenizers\]'"):
        tokenizer.load(str(trained))
