"""What makes a run the same run: which keys of its configuration may differ when it goes on, and which may not.

Every key of `configs/base.py` has one of four rules, that of its longest prefix in `RULES`:

    METHOD   part of what is trained: another value is refused, unless `resume.allow` names it
    SAID     part of how it is trained: another value is taken, said in one line and kept in the run's history
    CONTENT  decides which text is read: the text is compared instead of the key (`moe_erc/resume.py`)
    FREE     where, how fast and what is shown: another value is taken without a word
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from moe_erc.checks import BadInput, nearest

METHOD = "method"
SAID = "said"
CONTENT = "content"
FREE = "free"
RULES = {
    "seed": METHOD,  # the order of the rows
    "init_from": METHOD,
    "model": METHOD,
    "model.dtype": SAID,  # how the model is computed, but with other rounding
    "model.remat": FREE,
    "model.scan_unroll": FREE,
    "model.attention_implementation": FREE,
    "model.experts_implementation": FREE,
    "routers": METHOD,
    "losses": METHOD,
    "losses.lm.chunk": FREE,  # memory alone
    "data": METHOD,
    "data.sources": CONTENT,  # a directory may have been moved
    "data.text_key": CONTENT,
    "data.validation_fraction": CONTENT,
    "data.tokenizer": CONTENT,
    "data.planted": CONTENT,
    "data.cache_dir": FREE,
    "optimizer": METHOD,
    "optimizer.learning_rate": SAID,  # the schedule: what is tuned while a run goes on
    "optimizer.schedule": SAID,
    "optimizer.warmup_steps": SAID,
    "optimizer.decay_fraction": SAID,
    "optimizer.final_fraction": SAID,
    "train": SAID,  # steps, batch_size, micro_batches
    "train.profile_step": FREE,
    "guard": SAID,  # a run that it stopped goes on under another one
    "mesh": FREE,
    "eval": FREE,
    "checkpoint": FREE,
    "log": FREE,
    "resume": FREE,
}
SCHEDULE = ("train.steps", *(key for key, rule in RULES.items() if key[:10] == "optimizer." and rule == SAID))
ABSENT = "absent"


class Change(NamedTuple):
    """A key with another value than before; a part of the history of a run as [step, key, before, after]."""

    key: str
    before: object
    after: object

    def __str__(self):
        return f"{self.key} {_short(self.before)} -> {_short(self.after)}"


def rule_of(key: str) -> str:
    """The rule of a dotted key; METHOD for one that nobody has decided on."""
    parts = key.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((RULES[prefix] for prefix in prefixes if prefix in RULES), METHOD)


def differences(before: Mapping, after: Mapping) -> list[Change]:
    """Every key of two nested plain JSON descriptions whose values differ, in the order of `after`.

    A loss of weight 0 is not computed, and one router is in use: the options of the others make no difference.
    """
    before, after = json.loads(json.dumps([before, after]))
    return [change for change in _differences(before, after) if not _is_idle(change.key, before, after)]


def _differences(before: Mapping, after: Mapping, prefix: str = "") -> Iterator[Change]:
    for name in after | before:
        old = before.get(name, ABSENT)
        new = after.get(name, ABSENT)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield Change(prefix + name, old, new)


def _is_idle(key: str, before: Mapping, after: Mapping) -> bool:
    """Whether it is an option of a loss or a router that is not in use, before or afterwards."""
    block, *names = key.split(".")
    if block == "routers" and len(names) > 1:
        return not all(config.get("model", {}).get("router") == names[0] for config in (before, after))
    if block != "losses" or len(names) < 2 or names[-1] == "weight":
        return False
    return not all(config[block].get(names[0], {}).get("weight") for config in (before, after))


def check_same_run(meta: Mapping, expected: Mapping, allow: Sequence[str] = ()) -> list[Change]:
    """What differs between two descriptions of a run and may: keys that are SAID, and those that are allowed.

    Both are nested plain JSON, e.g. {"model": {"experts": 8}}; what else `meta` holds does not matter. BadInput, naming
    the first key of the METHOD that differs with both values, unless `allow` names it or a block that it is in.
    """
    saved = {name: meta[name] for name in expected if name in meta}
    changes = differences(saved, expected)
    for change in changes:
        if rule_of(change.key) == METHOD and not is_allowed(change.key, allow):
            raise BadInput(_refusal(change))
    return [change for change in changes if rule_of(change.key) in (METHOD, SAID)]


def _refusal(change: Change) -> str:
    block = change.key.split(".")[0]
    line = (
        f"the checkpoint was made with {change.key} = {change.before}, this run has {change.after}: "
        f"use another --workdir, set {change.key} back, or say that the change is meant with "
        f"--config.resume.allow=\"('{block}',)\""
    )
    if change.key == "data.sequence_length":
        line += "; the text is then cut into other windows, in another order"
    return line


def is_allowed(key: str, allow: Sequence[str]) -> bool:
    """Whether `resume.allow` names a dotted key, or a block that it is in."""
    return any(key == name or key.startswith(f"{name}.") for name in allow)


def check_names(allow: Sequence[str], config: Mapping) -> None:
    """Refuses a name in `resume.allow` that is no block and no key of the configuration, with the nearest that is."""
    if isinstance(allow, str):
        raise BadInput(f"resume.allow: {allow!r} is no list of names; write it as ('{allow}',)")
    known = list(_names(config))
    for name in allow:
        if name not in known:
            raise BadInput(
                f"resume.allow: no block and no key is called {name!r}; "
                f"the nearest is {nearest(name, known)!r}"
            )


def _names(config: Mapping, prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{name}.")


def _short(value: object) -> str:
    words = str(value)
    return words if len(words) <= 60 else words[:60] + "…"
