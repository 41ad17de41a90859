"""The embedded corpus: what is a document, where it goes, and that preparing it is all or nothing."""

import collections
import hashlib
import json
from pathlib import Path

import pytest

from moe_erc.checks import BadInput
from moe_erc.data import corpus, python_source, tfds_source
from moe_erc.data.python_source import Root

PREPARE_SLOWLY = """
import sys, time
from pathlib import Path
from moe_erc.data import corpus, tfds_source
from moe_erc.data.python_source import Root

def slowly(source, separate=corpus.separate):
    print("reading", file=sys.__stdout__, flush=True)
    time.sleep(0.05)
    return separate(source)

corpus.separate = slowly
roots = (Root("package", "1.0", "ml_code", Path(sys.argv[1])),)
tfds_source.prepare(lambda: corpus.EmbeddedCorpus(roots=roots, data_dir=sys.argv[2], file_format="array_record"))
"""


def records(builder):
    return {split: list(builder.as_data_source(split=split)) for split in ("train", "validation")}


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


@pytest.mark.parametrize("source", [b"def f(:\n", b"\xff\xfe", b"x = '\0'\n", b"# coding: nonsense\n"])
def test_what_is_not_python_is_refused(source):
    with pytest.raises((SyntaxError, ValueError)):
        python_source.separate(source)


def test_source_files_are_sorted_and_hold_no_tests(tree):
    names = [name for name, _ in python_source.source_files(tree[0])]
    assert names == sorted(names) and names[0] == "package/binary.py" and "package/m007.py" in names
    assert not [name for name in names if "test" in name]


def test_documents_by_domain_without_duplicates(built_corpus):
    documents = [record for split in records(built_corpus).values() for record in split]
    # 200 modules; the twin of m000 and the two files that are not Python add nothing.
    assert collections.Counter(d["domain"] for d in documents) == {b"ml_code": 200, b"prose": 200}
    assert len({d["text"] for d in documents}) == 400
    for document in documents:
        assert hashlib.sha256(document["text"]).hexdigest().encode() == document["sha256"]
    prose = {d["path"]: d["text"] for d in documents if d["domain"] == b"prose"}
    assert prose[b"package/m007.py"] == b"Prose 7.\n\nSays 7."
    assert b"package/m000.py" in prose and b"package/twin.py" not in prose


def test_splits_are_disjoint_and_do_not_depend_on_the_rest_of_the_corpus(built_corpus, build, make_tree, tmp_path):
    texts = {split: {record["text"] for record in found} for split, found in records(built_corpus).items()}
    assert not texts["train"] & texts["validation"]
    assert 0 < len(texts["validation"]) < 24  # 8 expected of 400 at 2 %; 24 is more than five standard deviations away
    fewer = build(make_tree(tmp_path / "fewer", modules=50), tmp_path / "data")
    for split, found in records(fewer).items():
        assert {record["text"] for record in found} <= texts[split]


def test_the_same_files_give_the_same_documents_in_the_same_order(tree, built_corpus, build, tmp_path):
    again = build(tree, tmp_path)
    assert records(again) == records(built_corpus)
    manifests = [(b.data_path / corpus.MANIFEST).read_text() for b in (again, built_corpus)]
    assert manifests[0] == manifests[1]


def test_manifest_has_the_digest_of_every_source_file(tree, built_corpus):
    manifest = json.loads((built_corpus.data_path / corpus.MANIFEST).read_text())
    assert manifest["versions"] == {"package": "1.0"}
    assert len(manifest["files"]) == 201  # 200 and the twin
    source = (tree[0].directory / "m003.py").read_bytes()
    assert manifest["files"]["package/m003.py"] == hashlib.sha256(source).hexdigest()


def test_the_directory_depends_on_the_versions(tree, tmp_path):
    newer = [tree[0]._replace(version="1.1")]
    assert corpus.directory(tmp_path, tree) == corpus.directory(tmp_path, list(tree))
    assert corpus.directory(tmp_path, tree) != corpus.directory(tmp_path, newer)


def test_installed_roots_are_the_standard_library_and_the_dependencies():
    roots = {root.name: root for root in python_source.installed_roots()}
    assert {"stdlib", "numpy", "jax", "flax", "tensorflow_datasets"} <= set(roots)
    assert {root.domain for root in roots.values()} == {"stdlib_code", "numeric_code", "ml_code"}
    assert (roots["stdlib"].directory / "ast.py").is_file() and (roots["numpy"].directory / "__init__.py").is_file()


@pytest.mark.parametrize("files_read", [1, 60])
def test_a_killed_preparation_leaves_nothing_that_looks_finished(
    tree, built_corpus, build, killed_after, tmp_path, files_read
):
    killed_after(PREPARE_SLOWLY, [tree[0].directory, tmp_path], lines=files_read)
    assert not list(tmp_path.rglob(corpus.MANIFEST)) and not list(tmp_path.rglob("dataset_info.json"))
    assert records(build(tree, tmp_path)) == records(built_corpus)


def test_the_loser_of_a_race_uses_the_winners_corpus(tree, built_corpus, build, tmp_path, monkeypatch):
    separate = corpus.separate

    def overtaken(source):
        monkeypatch.setattr(corpus, "separate", separate)
        build(tree, tmp_path)  # another process finishes while this one reads its first file
        return separate(source)

    monkeypatch.setattr(corpus, "separate", overtaken)
    assert records(build(tree, tmp_path)) == records(built_corpus)


def test_a_second_opening_reads_no_source(tree, built_corpus, build, monkeypatch):
    monkeypatch.setattr(corpus, "separate", None)
    builder = build(tree, Path(built_corpus.data_dir).parents[1])
    assert builder.info.splits["train"].num_examples == built_corpus.info.splits["train"].num_examples


def test_no_source_at_all_is_an_error(build, tmp_path):
    with pytest.raises(ValueError, match="'embedded' found no Python source under /nowhere") as error:
        build((Root("stdlib", "1", "stdlib_code", Path("/nowhere")),), tmp_path)
    assert "\n" not in str(error.value)


def test_an_unwritable_cache_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"data.cache_dir: cannot write in '.*file.*'.*MOE_ERC_CACHE"):
        tfds_source.embedded(tmp_path / "file")
