"""What a source looked like when a run read it.

A later look can say what has changed since.

The tokens themselves stay in the cache; this is for people: versions of libraries, names of files.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from moe_erc.checks import BadInput
from moe_erc.data import embedded, planted, text_files
from moe_erc.data.python_source import installed_trees, versions

MOST_FILES = 10_000  # whose names are kept; of more only their number and size
MOST_NAMED = 3  # files that a line names


def describe(name: str) -> dict:
    """What a source looks like, as plain JSON.

    Versions of `embedded`, name and version of a TFDS directory, files of a directory of text.
    """
    if name == embedded.NAME:
        return {"versions": versions(installed_trees())}
    if name == planted.NAME:  # the configuration says all of it
        return {}
    path = Path(name).expanduser()
    if (path / "dataset_info.json").is_file():
        return {"dataset": _name_and_version(path / "dataset_info.json")}
    if not path.is_dir():
        return {}
    try:
        found = {file: list(rest) for file, *rest in text_files.fingerprint(path)}
    except BadInput:  # no text in it any more
        found = {}
    if len(found) > MOST_FILES:
        return {"count": len(found), "bytes": sum(size for size, *_ in found.values())}
    return {"files": found}


def compare(name: str, before: Mapping) -> str:
    """What has changed about a source since `before`, what `describe` said then, in a few words.

    "" for nothing.
    """
    now = describe(name)
    if now == before or not before:
        return ""
    if "versions" in before and "versions" in now:
        return _compare_versions(before["versions"], now["versions"])
    if "files" in before and "files" in now:
        return _compare_files(before["files"], now["files"])
    if not now:
        return "it is no longer there"
    return f"{_counted(before)} then, {_counted(now)} now"


def _compare_versions(before: Mapping, now: Mapping) -> str:
    changed = [
        f"{library} {before.get(library, 'not installed')} -> {now.get(library, 'not installed')}"
        for library in sorted(before | now)
        if before.get(library) != now.get(library)
    ]
    return ", ".join(changed)


def _compare_files(before: Mapping, now: Mapping) -> str:
    kinds = {
        "added": sorted(now.keys() - before.keys()),
        "removed": sorted(before.keys() - now.keys()),
        "changed": sorted(file for file in now.keys() & before.keys() if now[file] != before[file]),
    }
    return ", ".join(_some(kind, files) for kind, files in kinds.items() if files)


def _some(kind: str, files: list[str]) -> str:
    named = ", ".join(files[:MOST_NAMED]) + (", …" if len(files) > MOST_NAMED else "")
    return f"{len(files)} {'file' if len(files) == 1 else 'files'} {kind} ({named})"


def _counted(description: Mapping) -> str:
    if "count" in description:
        return f"{description['count']:,} files of {description['bytes']:,} bytes"
    if "files" in description:
        return f"{len(description['files']):,} files"
    return str(description.get("dataset", "another kind of source"))


def _name_and_version(path: Path) -> str:
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        return f"{info.get('name')} {info.get('version')}"
    except (ValueError, AttributeError, RecursionError):
        return "unreadable"
