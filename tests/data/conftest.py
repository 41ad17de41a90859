"""A small world of text: a source tree with known documents, and streams that count upwards."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moe_erc
from moe_erc.data.config import DataConfig
from moe_erc.data.python_source import SourceTree
from moe_erc.data.streams import Corpus, Stream
from moe_erc.data.tokenizer import ByteTokenizer


def _make_tree(directory, modules):
    """Writes a package of `modules` files, each with code and a docstring.

    A duplicate, two files that are not valid Python, and two tests lie beside them.
    """
    package = directory / "package"
    (package / "tests").mkdir(parents=True)
    for number in range(modules):
        (package / f"m{number:03d}.py").write_text(
            f'# Licence\n"""Prose {number}."""\n\n\n'
            f'def f():\n    """Says {number}."""\n    return {number}\n'
        )
    (package / "twin.py").write_bytes((package / "m000.py").read_bytes())
    (package / "broken.py").write_text("def f(:\n")
    (package / "binary.py").write_bytes(b"\xff\xfe\x00")
    (package / "tests" / "inner.py").write_text("x = 'test'\n")
    (package / "test_outer.py").write_text("x = 'test'\n")
    return (SourceTree("package", "1.0", "ml_code", package),)


@pytest.fixture(scope="session")
def make_tree():
    """Writes a source tree with a number of modules."""
    return _make_tree


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return _make_tree(tmp_path_factory.mktemp("tree"), modules=200)


@pytest.fixture
def killed_after():
    """Runs Python code in its own process and kills it once it has printed so many lines."""

    def run(code, arguments, lines):
        environment = os.environ | {"PYTHONPATH": str(Path(moe_erc.__file__).parents[1])}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        ) as process:
            for _ in range(lines):
                assert process.stdout.readline(), "the process ended before it could be killed"
            process.kill()
        assert process.returncode < 0

    return run


@pytest.fixture
def config(tmp_path):
    """A configuration with everything at its default, for tests to replace fields of."""
    return DataConfig(("embedded",), (), "bytes", "text", 0.02, 4, str(tmp_path / "cache"))


@pytest.fixture
def text_directory(tmp_path):
    """300 one-line documents in one file."""
    directory = tmp_path / "words"
    directory.mkdir()
    (directory / "words.jsonl").write_text(
        "".join(f'{{"text": "word {number}"}}\n' for number in range(300))
    )
    return directory


@pytest.fixture
def two_documents(tmp_path):
    """A training and a validation document, in files named after their splits."""
    directory = tmp_path / "two"
    directory.mkdir()
    (directory / "train.txt").write_bytes(b"abcde")
    (directory / "validation.txt").write_text("é")
    return str(directory)


def _counting_stream(source, start, count):
    return Stream(
        source, np.arange(start, start + count, dtype="<u2"), count, 1, f"{start}-{count}"
    )


@pytest.fixture
def counting_stream():
    """Makes a stream whose tokens are start, start + 1, …: a window shows where it was cut."""
    return _counting_stream


@pytest.fixture
def counting_corpus():
    """Two sources of 41 and 21 tokens (10 and 5 windows of T = 4).

    The first also has a domain too short for one.
    """
    train = {
        "a": _counting_stream("one", 0, 41),
        "short": _counting_stream("one", 500, 4),
        "b": _counting_stream("two", 1000, 21),
    }
    return Corpus(
        ByteTokenizer(),
        {"train": train, "validation": {"a": _counting_stream("one", 0, 23)}},
        {},
        "identity",
    )


@pytest.fixture
def weighted_corpus(counting_corpus):
    return dataclasses.replace(counting_corpus, weights={"one": 1, "two": 3})
