"""A config file as `--config` names it, FILE[:SIZE].

It is read, or refused in one line that names the nearest.
"""

import importlib.machinery
import pathlib
import traceback
import types
from collections.abc import Iterator

from ml_collections import ConfigDict

from moe_erc.checks import BadInput, nearest

NO_CONFIGS = ("__init__.py", "sizes.py")


def load(argument: str) -> ConfigDict:
    """What `get_config` of the file returns, called with the size if one is given.

    Whatever the file's own code raises is a fault of that file: BadInput with its line.
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
        config = module.get_config(*([size] if colon else []))
    except (BadInput, OSError):
        raise
    except Exception as error:
        raise BadInput(_blame(path, error)) from error
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise BadInput(f"--config: get_config of {path!r} returns a {kind}; return a ConfigDict")
    return config


def check_exists(path: str) -> None:
    """BadInput for what is no file, with the config that was probably meant."""
    if not path:
        raise BadInput(
            "--config: no file is named; give FILE[:SIZE], such as "
            f"{next(known_files(), 'my_config.py')}"
        )
    if pathlib.Path(path).is_dir():
        inside = [
            name for name in known_files() if pathlib.Path(path) in pathlib.Path(name).parents
        ]
        mend = f", such as {inside[0]}" if inside else ""
        raise BadInput(f"--config: {path!r} is a directory; name a file in it{mend}")
    if not pathlib.Path(path).is_file():
        meant = _nearest_file(path)
        mend = f"the nearest is {meant}" if meant else "give FILE[:SIZE]"
        raise BadInput(f"--config: there is no file {path!r}; {mend}")


def beside_the_script(argument: str | None) -> str | None:
    """The same where the current directory has that file.

    Else that of the project, wherever it was started from.
    """
    project = pathlib.Path(__file__).parents[2]
    if argument and not pathlib.Path(argument.partition(":")[0]).exists():
        return str(project / argument)
    return argument


def known_files() -> Iterator[str]:
    """The configs below the directory `configs` of the current directory, else of the project.

    Ablations last.
    """
    here = pathlib.Path("configs")
    project = pathlib.Path(__file__).parents[2] / "configs"
    found = (here if here.is_dir() else project).rglob("*.py")
    for path in sorted(found, key=lambda path: (len(path.parts), path)):
        if path.name not in NO_CONFIGS:
            yield str(path)


def check_fields(argument: str, config: ConfigDict, reference: ConfigDict, block: str = "") -> None:
    """Refuses a config that has not the keys of the reference, of the same types.

    With a `block` only the keys of that block have to be there.
    """
    kinds = dict(leaves(reference))
    found = dict(leaves(config))
    for key, value in found.items():
        if key not in kinds:
            raise BadInput(
                f"--config={argument}: no such key as config.{key}; "
                f"the nearest is config.{nearest_key(key, list(kinds))}"
            )
        if not _fits(value, kinds[key]):
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
    """The key that was probably meant: one of the same name in another block, if there is one."""
    name = key.rpartition(".")[2]
    namesakes = [other for other in known if other.rpartition(".")[2] == name]
    return nearest(key, namesakes or known)


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of everything that is no block."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _fits(value: object, like: object) -> bool:
    if isinstance(like, bool) or isinstance(value, bool):
        return isinstance(like, bool) and isinstance(value, bool)
    if isinstance(like, float):
        return isinstance(value, int | float)
    if isinstance(like, tuple):
        return isinstance(value, tuple | list)
    return isinstance(value, type(like))


def _nearest_file(path: str) -> str:
    """Of the same name with or without .py first, else by likeness.

    "" where there is none at all.
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
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == path
    ]
    reason = str(error)
    if isinstance(error, SyntaxError):
        lines = [error.lineno] if error.lineno else []
        reason = error.msg
    where = f"line {lines[-1]} of {path!r}" if lines else f"{path!r}"
    return f"--config: {where} fails: {reason} ({type(error).__name__})"
