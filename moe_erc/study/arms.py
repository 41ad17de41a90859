"""A study file -> its runs: every arm as a whole configuration, or one line that refuses it.

Everything is checked before anything is run.
"""

import dataclasses
import importlib.machinery
import pathlib
import traceback
import types
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from moe_erc.checks import BadInput, nearest
from moe_erc.data import cache
from moe_erc.data.config import DataConfig
from moe_erc.launch import command_line, config_file
from moe_erc.measures.base import Measure
from moe_erc.measures.registry import MEASURES, find
from moe_erc.model.config import ModelConfig
from moe_erc.study.plan import Arm, Study

SEED = "seed"  # the key of a configuration that is another one in every run
# Blocks and keys without any influence on what a run finds.
WITHOUT_INFLUENCE = ("checkpoint", "log", "resume", "data.cache_dir", "train.profile_step")
# Keys that are the method and not the size of a run.
METHOD = ("losses.", "routers.", "model.router", "model.shared_experts")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The configuration of an arm: what `train.py` is told, and every key with its value."""

    arm: str
    arguments: tuple[str, ...]  # of train.py, without seed and workdir
    config: ConfigDict
    # {dotted key: value} of what has an influence, but for the seed, as JSON keeps it.
    values: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Equal for equal configurations."""
        return cache.digest(dict(self.values))

    @property
    def tokens(self) -> int:
        """Training tokens of a run."""
        train = self.config.train
        return train.steps * train.batch_size * self.config.data.sequence_length


@dataclasses.dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    settings: Settings
    seed: int

    @property
    def arm(self) -> str:
        """The name of the arm."""
        return self.settings.arm

    @property
    def name(self) -> str:
        """The name of its directory."""
        return f"{self.arm}-{self.seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A study with its name, its place and its runs."""

    name: str
    path: pathlib.Path
    study: Study
    settings: Mapping[str, Settings]  # by arm
    measure: Measure  # the outcome
    aa: "Plan | None"  # the A/A study of this size
    defaults: Mapping[str, Any]  # of keys of the configuration that are younger than a row

    @property
    def rows_path(self) -> pathlib.Path:
        """Where the rows of its finished runs are."""
        return self.path.parent / "rows" / f"{self.name}.jsonl"

    @property
    def runs(self) -> list[Run]:
        """All runs. A study that is stopped half way has about as many runs of every arm."""
        runs = []
        for arm, settings in self.settings.items():
            runs += [Run(settings, seed) for seed in self.study.seeds_of(arm)]

        def share_of_its_arm(run):
            seeds = self.study.seeds_of(run.arm)
            return seeds.index(run.seed) / len(seeds)

        return sorted(runs, key=share_of_its_arm)


def open_plan(path: str | pathlib.Path, seeds: int | None = None) -> Plan:
    """The plan of a study file.

    Args:
      path: of the file; it has a function get_study().
      seeds: runs of every arm in place of those of the study.

    Raises:
      BadInput: for a file that gives no study, a config or a key that does not exist, arms with
        equal configurations, an outcome that is no measure, and an A/A study of another size.
    """
    path = pathlib.Path(path)
    study = _load(path).with_seeds(seeds)
    measure = _outcome(study)
    for key in study.also:
        _measure("study.also", key)
    settings = {name: _settings(study, name, arm) for name, arm in study.arms.items()}
    _check_arms(study, settings)
    _check_evaluations(study, settings)
    aa = _open_aa(path, study, settings, seeds) if study.aa else None
    defaults = _plain(config_file.load(config_file.beside_the_script("configs/base.py")))
    return Plan(path.stem, path, study, settings, measure, aa, defaults)


def _load(path: pathlib.Path) -> Study:
    if not path.is_file():
        known = [str(other) for other in sorted(pathlib.Path("studies").glob("*.py"))]
        mend = f"the nearest is {nearest(path, known)}" if known else "give a file with get_study()"
        raise BadInput(f"--study: there is no file '{path}'; {mend}")
    module = types.ModuleType("study")
    try:
        importlib.machinery.SourceFileLoader("study", str(path)).exec_module(module)
        study = module.get_study()
    except (BadInput, OSError):
        raise
    except Exception as error:
        raise BadInput(_blame(path, error)) from error
    if not isinstance(study, Study):
        raise BadInput(f"--study: get_study of '{path}' returns {study!r}; return a Study")
    return study


def _blame(path, error):
    """The line of the study file in which it fails."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    where = f"line {lines[-1]} of '{path}'" if lines else f"'{path}'"
    return f"--study: {where} fails: {error} ({type(error).__name__})"


def _measure(field: str, key: str) -> Measure:
    found = find(key)
    if found is not None and not found.name:
        raise BadInput(f"{field}: {key!r} is a family of measures; give one, such as '{key}/mean'")
    if found is None:
        known = [other for other in MEASURES if "/" in other]
        raise BadInput(
            f"{field}: {key!r} is no measure; the nearest is {nearest(key, known)!r}, "
            "and docs/measures.md has all"
        )
    return found


def _outcome(study: Study) -> Measure:
    measure = _measure("study.outcome", study.outcome)
    if measure.better is None:
        raise BadInput(
            f"study.outcome: of {study.outcome!r} neither more nor less is better; "
            "give a measure that is better when higher or lower"
        )
    return measure


def _settings(study: Study, name: str, arm: Arm) -> Settings:
    argument = config_file.beside_the_script(arm.config)
    overrides = {**study.overrides, **arm.overrides}
    config = config_file.load(argument)
    known = dict(config_file.leaves(config))
    for key, value in overrides.items():
        if key not in known or key == SEED:
            raise BadInput(
                f"study.arms: {name!r} overrides {key!r}, which is no key that an arm may set; "
                f"the nearest is {config_file.nearest_key(key, list(known))!r}"
            )
        _set(config, name, key, value, known[key])
    # A number or a word out of its range ends here and not in the first run.
    command_line.check_numbers(config)
    ModelConfig.of(config)
    DataConfig(**config.data)
    arguments = (f"--config={argument}", *(f"--config.{key}={overrides[key]}" for key in overrides))
    return Settings(name, arguments, config, _plain(config))


def _set(config, arm, key, value, like):
    if isinstance(like, tuple) and isinstance(value, list):
        value = tuple(value)
    if isinstance(like, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(like):
        kind = type(like).__name__
        raise BadInput(f"study.arms: {arm!r} sets {key} to {value!r}; give a value of type {kind}")
    block, _, field = key.rpartition(".")
    owner = config
    for part in filter(None, block.split(".")):
        owner = owner[part]
    owner[field] = value


def _plain(config: ConfigDict) -> dict[str, Any]:
    """{dotted key: value} of what has an influence, with lists for tuples, as JSON keeps it."""
    values = {}
    for key, value in config_file.leaves(config):
        block = key.partition(".")[0]
        if key != SEED and block not in WITHOUT_INFLUENCE and key not in WITHOUT_INFLUENCE:
            values[key] = list(value) if isinstance(value, tuple) else value
    return values


def _check_arms(study: Study, settings: Mapping[str, Settings]) -> None:
    """Arms of an A/A study are equal, those of another study all differ."""
    names_by_digest: dict[str, str] = {}
    for name, of_arm in settings.items():
        first = names_by_digest.setdefault(of_arm.digest, name)
        if first != name and not study.is_aa:
            raise BadInput(
                f"study.arms: {first!r} and {name!r} have equal configs; "
                "change one of them, or set is_aa for an A/A study"
            )
    if study.is_aa and len(names_by_digest) > 1:
        names = ", ".join(map(repr, names_by_digest.values()))
        raise BadInput(f"study.arms: {names} differ; the arms of an A/A study have equal configs")


def _check_evaluations(study: Study, settings: Mapping[str, Settings]) -> None:
    for name, of_arm in settings.items():
        steps = of_arm.config.train.steps
        every = of_arm.config.eval.every
        planned = -(-steps // every)
        if study.evaluations > planned:
            raise BadInput(
                f"study.evaluations: {study.evaluations}, but a run of {name!r} has {planned} "
                f"({steps} steps, eval.every {every}); use at most {planned}"
            )


def _open_aa(path, study, settings, seeds):
    aa = open_plan(path.with_name(f"{study.aa}.py"), seeds)
    if not aa.study.is_aa:
        raise BadInput(f"study.aa: {study.aa!r} is no A/A study; its file has to set is_aa")
    theirs = aa.settings[aa.study.control].values
    mine = settings[study.control].values
    keys = [key for key in mine if mine[key] != theirs[key] and not key.startswith(METHOD)]
    if keys:
        raise BadInput(
            f"study.aa: {study.aa!r} is of another size: its control differs from "
            f"{study.control!r} in {', '.join(keys)}"
        )
    same = (study.outcome, study.evaluations)
    if same != (aa.study.outcome, aa.study.evaluations):
        raise BadInput(
            f"study.aa: {study.aa!r} has another outcome, {aa.study.outcome!r} over "
            f"{aa.study.evaluations} evaluations; give both studies the same"
        )
    return aa
