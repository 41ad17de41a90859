"""A description of a source at the time when a run read it, and what has changed since.

The tokens themselves stay in the cache. The description is for people: versions of libraries, names
of files.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from moe_erc.checks import BadInput
from moe_erc.data import embedded, planted, text_files
from moe_erc.data.python_source import installed_trees, versions
from moe_erc.data.shards import group, is_pattern

MOST_FILES = 10_000  # of so many files names are kept; of more only their number and size
MOST_NAMED = 3  # files that are named in one line


def describe(name: str) -> dict:
    """The description of a source, as plain JSON.

    It has the versions of `embedded`, the name and version of a TFDS directory, or the files of a
    directory of text or of token shards.
    """
    if name == embedded.NAME:
        return {"versions": versions(installed_trees())}
    if name == planted.NAME:  # the configuration says all of it
        return {}
    if is_pattern(name):
        return _listed({file: [size] for file, size in group.describe(name).items()})
    path = Path(name).expanduser()
    if (path / "dataset_info.json").is_file():
        return {"dataset": _name_and_version(path / "dataset_info.json")}
    if not path.is_dir():
        return {}
    try:
        found = {file: list(rest) for file, *rest in text_files.fingerprint(path)}
    except BadInput:  # no text in it any more
        found = {}
    return _listed(found)


def _listed(found: dict[str, list]) -> dict:
    if len(found) > MOST_FILES:
        return {"count": len(found), "bytes": sum(size for size, *_ in found.values())}
    return {"files": found}


def compare(name: str, before: Mapping) -> str:
    """What has changed of a source since `before`, in a few words; "" for nothing.

    `before` is what `describe` returned then.
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
    changed = []
    for library in sorted(before | now):
        version_before = before.get(library, "not installed")
        version_now = now.get(library, "not installed")
        if version_before != version_now:
            changed.append(f"{library} {version_before} -> {version_now}")
    return ", ".join(changed)


def _compare_files(before: Mapping, now: Mapping) -> str:
    in_both = now.keys() & before.keys()
    kinds = {
        "added": sorted(now.keys() - before.keys()),
        "removed": sorted(before.keys() - now.keys()),
        "changed": sorted(file for file in in_both if now[file] != before[file]),
    }
    return ", ".join(_some(kind, files) for kind, files in kinds.items() if files)


def _some(kind: str, files: list[str]) -> str:
    named = ", ".join(files[:MOST_NAMED])
    more = ", …" if len(files) > MOST_NAMED else ""
    noun = "file" if len(files) == 1 else "files"
    return f"{len(files)} {noun} {kind} ({named}{more})"


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
