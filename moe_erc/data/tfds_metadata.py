"""The metadata of a prepared data set, checked before TFDS uses them.

TFDS imports the module of any class that features.json names, and opens any path that
dataset_info.json gives for a split. Someone else may have written the directory. Only classes of
TFDS itself and files in the same directory are therefore accepted.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from moe_erc.checks import BadInput

_OWN = "tensorflow_datasets."
_CLASS_KEYS = ("type", "pythonClassName", "python_class_name")
_FILE_KEYS = ("filepathTemplate", "filepath_template")


def check(directory: Path) -> None:
    """Refuse a foreign class, a path that leads elsewhere, and a file that is not JSON."""
    for path in (directory / "features.json", directory / "dataset_info.json"):
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise BadInput(
                f"data.sources: '{directory}' holds a {path.name} that TFDS cannot read ({error}); "
                "prepare it again"
            ) from None
        for key, value in _strings(content):
            if key in _CLASS_KEYS and "." in value and not value.startswith(_OWN):
                raise BadInput(
                    f"data.sources: '{path}' names the class {value!r}; "
                    "only those of TFDS are loaded"
                )
            if key in _FILE_KEYS and ("/" in value or "\\" in value):
                raise BadInput(
                    f"data.sources: '{path}' names the files {value!r}, not files beside it; "
                    "refused"
                )


def _strings(content: object) -> Iterator[tuple[str, str]]:
    """Every (key, string) of any depth."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                if isinstance(inner, str):
                    yield key, inner
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
