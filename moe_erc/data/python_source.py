"""Installed Python source as text: its files, and code and docstrings apart.

Tests are left out for three reasons. They are tables of expected values and near copies of one
another. They are larger than the libraries that they test (19 of the 31 MB of the standard
library). Many distributions strip them, so that the text would depend on the distribution.
"""

import ast
import importlib.metadata
import importlib.util
import inspect
import platform
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# import name, distribution name, domain of its code
_PACKAGES = (
    ("numpy", "numpy", "numeric_code"),
    ("scipy", "scipy", "numeric_code"),
    ("jax", "jax", "ml_code"),
    ("flax", "flax", "ml_code"),
    ("optax", "optax", "ml_code"),
    ("orbax.checkpoint", "orbax-checkpoint", "ml_code"),
    ("grain", "grain", "ml_code"),
    ("tensorflow_datasets", "tensorflow-datasets", "ml_code"),
    ("etils", "etils", "ml_code"),
    ("absl", "absl-py", "ml_code"),
    ("ml_collections", "ml-collections", "ml_code"),
)
_SKIPPED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
_TEST_FILE = re.compile(r"test_.*|.*_test|conftest")
_LEADING_COMMENTS = re.compile(rb"\A(?:[ \t\f]*(?:#[^\n]*)?\n)+")
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_WITH_STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)


class SourceTree(NamedTuple):
    """A tree of source files with one domain and one version."""

    name: str
    version: str
    domain: str
    directory: Path


def installed_trees() -> tuple[SourceTree, ...]:
    """The standard library and the installed core dependencies, none of which is imported."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    trees = [SourceTree("stdlib", platform.python_version(), "stdlib_code", stdlib)]
    for package, distribution, domain in _PACKAGES:
        try:
            version = importlib.metadata.version(distribution)
            spec = importlib.util.find_spec(package)
        except (importlib.metadata.PackageNotFoundError, ModuleNotFoundError):
            continue
        if spec and spec.submodule_search_locations:
            directory = Path(next(iter(spec.submodule_search_locations)))
            trees.append(SourceTree(package.replace(".", "/"), version, domain, directory))
    return tuple(trees)


def source_files(tree: SourceTree) -> list[tuple[str, Path]]:
    """The files of a tree that are not tests, with their relative paths.

    The order depends on these paths alone.
    """
    found = []
    for path in tree.directory.rglob("*.py"):
        relative = path.relative_to(tree.directory)
        is_skipped = bool(_SKIPPED_DIRECTORIES.intersection(relative.parts[:-1]))
        if not is_skipped and not _TEST_FILE.fullmatch(path.stem):
            found.append((f"{tree.name}/{relative.as_posix()}", path))
    return sorted(found)


def separate(source: bytes) -> tuple[bytes, bytes]:
    """(code without docstrings, the docstrings joined by blank lines).

    The code still parses: a body that was only a docstring becomes `...`. Leading comments are cut
    too, because they are licence headers, which are alike in all files of a project.

    Raises:
      SyntaxError, ValueError: for a text that is not Python.
    """
    text = importlib.util.decode_source(source).encode()
    docstrings = list(_docstrings(ast.parse(text)))
    prose = []
    for expression, _ in docstrings:
        cleaned = inspect.cleandoc(expression.value.value)
        if cleaned:
            prose.append(cleaned.encode(errors="replace"))
    lines = text.split(b"\n")
    # From the last to the first, so that the positions of those still to be cut stay valid.
    docstrings.sort(key=lambda found: found[0].lineno, reverse=True)
    for expression, is_only_statement in docstrings:
        _cut(lines, expression, b"..." if is_only_statement else b"")
    return _LEADING_COMMENTS.sub(b"", b"\n".join(lines)), b"\n\n".join(prose)


def _docstrings(node: ast.AST) -> Iterator[tuple[ast.Expr, bool]]:
    """Every docstring of a module, class or function, and whether its body holds nothing else.

    A module may be empty, so that False is said of it in any case.
    """
    if isinstance(node, _WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
        yield node.body[0], len(node.body) == 1 and not isinstance(node, ast.Module)
    for child in ast.iter_child_nodes(node):
        # Expressions, which are most of the tree, hold no docstrings.
        if isinstance(child, _WITH_STATEMENTS):
            yield from _docstrings(child)


def _cut(lines: list[bytes], expression: ast.Expr, replacement: bytes) -> None:
    """Replace an expression in place; lines that it filled alone are removed."""
    first = expression.lineno - 1
    last = expression.end_lineno - 1
    before = lines[first][: expression.col_offset]
    behind = lines[last][expression.end_col_offset :].lstrip(b"; ")
    rest = before + replacement + behind
    lines[first : last + 1] = [rest] if rest.strip() else []


def versions(trees: Sequence[SourceTree]) -> dict[str, str]:
    """The versions on which the text depends, by name of the tree."""
    return {tree.name: tree.version for tree in trees}
