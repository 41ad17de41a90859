"""A config file as `--config` names it, FILE[:SIZE].

It is read, or it is refused in one line with the nearest name.
"""

import importlib.machinery
import pathlib
import traceback
import types
from collections.abc import Iterator

from ml_collections import ConfigDict

from moe_erc.checks import BadInput, nearest

NO_CONFIGS = ("__init__.py", "sizes.py")
_PACKAGE = pathlib.Path(__file__).parents[1]
# A wheel holds train.py and configs/ inside the package (setup.py); a clone, beside it.
PROJECT = _PACKAGE / "scripts" if (_PACKAGE / "scripts").is_dir() else _PACKAGE.parent


def load(argument: str) -> ConfigDict:
    """The config that `get_config` of the file returns; it is called with the size if one is given.

    An exception of the file's own code becomes a BadInput with the line of the file.
    """
    path, colon, size = argument.partition(":")
    check_exists(path)
    module = types.ModuleType("config")
    try:
        importlib.machinery.SourceFileLoader("config", path).exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise BadInput(
                f"--config: {path!r} has no function get_config(size), which returns a config"
            )
        config = module.get_config(size) if colon else module.get_config()
    except (BadInput, OSError):
        raise
    except Exception as error:
        raise BadInput(_blame(path, error)) from error
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise BadInput(f"--config: get_config of {path!r} returns a {kind}; return a ConfigDict")
    return config


def check_exists(path: str) -> None:
    """Refuse a path that is no file, with the config that was probably meant."""
    if not path:
        raise BadInput(
            "--config: no file is named; give FILE[:SIZE], such as "
            f"{next(known_files(), 'my_config.py')}"
        )
    if pathlib.Path(path).is_dir():
        directory = pathlib.Path(path)
        inside = [name for name in known_files() if directory in pathlib.Path(name).parents]
        mend = f", such as {inside[0]}" if inside else ""
        raise BadInput(f"--config: {path!r} is a directory; name a file in it{mend}")
    if not pathlib.Path(path).is_file():
        meant = _nearest_file(path)
        mend = f"the nearest is {meant}" if meant else "give FILE[:SIZE]"
        raise BadInput(f"--config: there is no file {path!r}; {mend}")


def beside_the_script(argument: str | None) -> str | None:
    """FILE[:SIZE] in the current directory if it exists there, else in the project."""
    if argument and not pathlib.Path(argument.partition(":")[0]).exists():
        return str(PROJECT / argument)
    return argument


def known_files() -> Iterator[str]:
    """The configs in `configs` of the current directory, or of the project; subfolders last."""
    here = pathlib.Path("configs")
    found = (here if here.is_dir() else PROJECT / "configs").rglob("*.py")
    for path in sorted(found, key=lambda path: (len(path.parts), path)):
        if path.name not in NO_CONFIGS:
            yield str(path)


def check_fields(argument: str, config: ConfigDict, reference: ConfigDict, block: str = "") -> None:
    """Refuse a config whose keys or types are not those of the reference.

    With a `block`, keys of other blocks may be missing.
    """
    kinds = dict(leaves(reference))
    found = dict(leaves(config))
    for key, value in found.items():
        if key not in kinds:
            raise BadInput(
                f"--config={argument}: no such key as config.{key}; "
                f"the nearest is config.{nearest_key(key, list(kinds))}"
            )
        if not _is_like(value, kinds[key]):
            wanted = type(kinds[key]).__name__
            raise BadInput(
                f"--config={argument}: config.{key} is {value!r}; give a value of type {wanted}"
            )
    for key in kinds:
        if key not in found and key.startswith(block):
            raise BadInput(
                f"--config={argument}: config.{key} is missing; "
                "begin with config = configs.base.get_config(size)"
            )


def nearest_key(key: str, known: list[str]) -> str:
    """The key that was probably meant; a key of the same name in another block comes first."""
    name = key.rpartition(".")[2]
    namesakes = [other for other in known if other.rpartition(".")[2] == name]
    return nearest(key, namesakes or known)


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of every value that is not a block."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _is_like(value: object, like: object) -> bool:
    if isinstance(like, bool) or isinstance(value, bool):
        return isinstance(like, bool) and isinstance(value, bool)
    if isinstance(like, float):
        return isinstance(value, int | float)
    if isinstance(like, tuple):
        return isinstance(value, tuple | list)
    return isinstance(value, type(like))


def _nearest_file(path: str) -> str:
    """The config that was probably meant, or "" if there are no configs.

    A file of the same name in another folder, or without .py, comes before similar names.
    """
    known = list(known_files())
    wanted = pathlib.Path(path).with_suffix("")
    for name in known:
        if pathlib.Path(name).stem == wanted.name:
            return name
    stems = {pathlib.Path(name).stem: name for name in known}
    return stems[nearest(wanted.name, stems)] if stems else ""


def _blame(path: str, error: Exception) -> str:
    """The line of the config file in which it fails."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    reason = str(error)
    if isinstance(error, SyntaxError):
        lines = [error.lineno] if error.lineno else []
        reason = error.msg
    where = f"line {lines[-1]} of {path!r}" if lines else f"{path!r}"
    return f"--config: {where} fails: {reason} ({type(error).__name__})"
