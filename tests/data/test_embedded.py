"""The embedded corpus: what is a document, where it goes, and in which order."""

import collections
import dataclasses
import hashlib
from pathlib import Path

import pytest

from moe_erc.checks import BadInput
from moe_erc.data import embedded, python_source
from moe_erc.data.document import Document
from moe_erc.data.python_source import SourceTree
from moe_erc.data.sources import open_source
from moe_erc.data.text import prepare


def texts(documents, split):
    return {document.text for document in documents if document.split == split}


def test_code_and_docstrings_are_separated():
    source = b'''# Licence
"""Module."""
import os  # kept


class C:
    """Only a docstring."""


def f():
    "One"; "line"
    return """not a docstring"""


async def g():
    """Two
       lines."""
    x = 1
'''
    code, prose = python_source.separate(source)
    assert prose.decode().split("\n\n") == ["Module.", "Only a docstring.", "One", "Two\nlines."]
    assert code.decode() == (
        "import os  # kept\n\n\nclass C:\n    ...\n\n\n"
        'def f():\n    "line"\n    return """not a docstring"""\n\n\n'
        "async def g():\n    x = 1\n"
    )


@pytest.mark.parametrize(
    "source", [b"def f(:\n", b"\xff\xfe", b"x = '\0'\n", b"# coding: nonsense\n"]
)
def test_what_is_not_python_is_refused(source):
    with pytest.raises((SyntaxError, ValueError)):
        python_source.separate(source)


def test_source_files_are_sorted_and_hold_no_tests(tree):
    names = [name for name, _ in python_source.source_files(tree[0])]
    assert names == sorted(names) and names[0] == "package/binary.py" and "package/m007.py" in names
    assert not [name for name in names if "test" in name]


def test_documents_by_domain_without_duplicates(tree):
    documents = list(embedded.documents(tree))
    # 200 modules; the twin of m000 and the two files that are not Python add nothing.
    domains = collections.Counter(document.domain for document in documents)
    assert domains == {"ml_code": 200, "prose": 200}
    assert len({document.text for document in documents}) == 400
    assert Document("train", "prose", b"Prose 7.\n\nSays 7.") in documents


def test_splits_are_disjoint_and_do_not_depend_on_the_rest_of_the_corpus(tree, make_tree, tmp_path):
    documents = list(embedded.documents(tree))
    assert not texts(documents, "train") & texts(documents, "validation")
    # 8 expected of 400 at 2 %; 24 is more than five standard deviations away
    assert 0 < len(texts(documents, "validation")) < 24
    fewer = list(embedded.documents(make_tree(tmp_path / "fewer", modules=50)))
    for split in ("train", "validation"):
        assert texts(fewer, split) <= texts(documents, split)


def test_the_same_files_give_the_same_documents_in_the_order_of_a_hash(tree):
    documents = list(embedded.documents(tree))
    assert documents == list(embedded.documents(tree))
    for split in ("train", "validation"):
        places = []
        for document in documents:
            if document.split == split:
                digest = hashlib.sha256(document.text).hexdigest()
                places.append(hashlib.md5(f"{split}{digest}".encode()).hexdigest())
        assert places == sorted(places)
    splits = [document.split for document in documents]
    assert splits == sorted(splits)  # training documents first


def test_the_identity_follows_the_versions(config, tree, monkeypatch):
    def identity(trees):
        monkeypatch.setattr("moe_erc.data.sources.installed_trees", lambda: trees)
        return open_source("embedded", config).identity

    newer = (tree[0]._replace(version="1.1"),)
    assert identity(tree) == identity(tuple(tree)) != identity(newer)


def test_installed_trees_are_the_standard_library_and_the_dependencies():
    trees = {tree.name: tree for tree in python_source.installed_trees()}
    assert {"stdlib", "numpy", "jax", "flax", "tensorflow_datasets"} <= set(trees)
    assert {tree.domain for tree in trees.values()} == {"stdlib_code", "numeric_code", "ml_code"}
    assert (trees["stdlib"].directory / "ast.py").is_file()
    assert (trees["numpy"].directory / "__init__.py").is_file()


def test_a_second_run_reads_no_source(config, tree, monkeypatch):
    monkeypatch.setattr("moe_erc.data.sources.installed_trees", lambda: tree)
    first = prepare(dataclasses.replace(config, text_key="content"))
    monkeypatch.setattr(embedded, "separate", None)
    assert prepare(config).identity == first.identity


def test_no_source_at_all_is_an_error():
    nowhere = SourceTree("stdlib", "1", "stdlib_code", Path("/nowhere"))
    with pytest.raises(
        ValueError, match="'embedded' found no Python source under /nowhere"
    ) as error:
        list(embedded.documents((nowhere,)))
    assert "\n" not in str(error.value)


def test_an_unwritable_cache_is_named(config, tree, tmp_path, monkeypatch):
    monkeypatch.setattr("moe_erc.data.sources.installed_trees", lambda: tree)
    (tmp_path / "file").write_text("")
    where = dataclasses.replace(config, cache_dir=str(tmp_path / "file"))
    message = r"data.cache_dir: cannot write in '.*file.*'.*MOE_ERC_CACHE"
    with pytest.raises(BadInput, match=message):
        prepare(where)
