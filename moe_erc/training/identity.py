"""Which keys of a run's configuration may differ when it goes on, and which may not.

Every key of `configs/base.py` has one of four rules, that of its longest prefix in `RULES`:

    METHOD   part of what is trained: another value is refused, unless `resume.allow` names it
    SAID     part of how it is trained: another value is taken, said in one line and kept in the
             run's history
    CONTENT  decides which text is read: the texts are compared, not the keys (`moe_erc/resume.py`)
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
    "init_upcycled": METHOD,
    "model": METHOD,
    "model.dtype": SAID,  # the same model, computed with other rounding
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
    "data.tokens": CONTENT,
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
_OF_THE_OPTIMIZER = [key for key in RULES if key.startswith("optimizer.") and RULES[key] == SAID]
# What decides the learning rate of a step.
SCHEDULE = ("train.steps", *_OF_THE_OPTIMIZER)
ABSENT = "absent"


class Change(NamedTuple):
    """A key of the configuration that has another value than before."""

    key: str
    before: object
    after: object

    def __str__(self):
        return f"{self.key} {_short(self.before)} -> {_short(self.after)}"


def rule_of(key: str) -> str:
    """The rule of a dotted key; METHOD for one that nobody has decided on."""
    parts = key.split(".")
    for count in range(len(parts), 0, -1):
        prefix = ".".join(parts[:count])
        if prefix in RULES:
            return RULES[prefix]
    return METHOD


def differences(before: Mapping, after: Mapping) -> list[Change]:
    """Every key of two configurations whose values differ, in the order of `after`.

    Both are nested plain JSON. The options of losses of weight 0 and of routers that are not in use
    make no difference.
    """
    # Through JSON, so that a tuple equals the list that was saved for it.
    before, after = json.loads(json.dumps([before, after]))
    found = _differences(before, after)
    return [change for change in found if not _is_idle(change.key, before, after)]


def _differences(before: Mapping, after: Mapping, prefix: str = "") -> Iterator[Change]:
    for name in after | before:
        old = before.get(name, ABSENT)
        new = after.get(name, ABSENT)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield Change(prefix + name, old, new)


def _is_idle(key: str, before: Mapping, after: Mapping) -> bool:
    """Whether it is an option of a loss or a router that is not in use both before and after."""
    block, *names = key.split(".")
    if block == "routers" and len(names) > 1:
        router = names[0]
        return not (_has_router(before, router) and _has_router(after, router))
    if block == "losses" and len(names) >= 2 and names[-1] != "weight":
        loss = names[0]
        return not (_has_loss(before, loss) and _has_loss(after, loss))
    return False


def _has_router(config: Mapping, name: str) -> bool:
    return config.get("model", {}).get("router") == name


def _has_loss(config: Mapping, name: str) -> bool:
    return bool(config["losses"].get(name, {}).get("weight"))


def check_same_run(meta: Mapping, expected: Mapping, allow: Sequence[str] = ()) -> list[Change]:
    """The changes between two configurations of a run that are SAID, or allowed.

    Both are nested plain JSON, e.g. {"model": {"experts": 8}}. Blocks that only `meta` has do not
    matter. BadInput if a key of the METHOD differs, unless `allow` names it or a block that it is
    in. The message names the first such key and both values.
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
        f"the checkpoint was made with {change.key} = {change.before}, "
        f"this run has {change.after}: use another --workdir, set {change.key} back, "
        f"or say that the change is meant with --config.resume.allow=\"('{block}',)\""
    )
    if change.key == "data.sequence_length":
        line += "; the text is then cut into other windows, in another order"
    return line


def is_allowed(key: str, allow: Sequence[str]) -> bool:
    """Whether `resume.allow` names a dotted key, or a block that it is in."""
    return any(key == name or key.startswith(f"{name}.") for name in allow)


def check_names(allow: Sequence[str], config: Mapping) -> None:
    """Refuses a name in `resume.allow` that is neither a block nor a key of the configuration.

    The message says which name is nearest.
    """
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
    """The names of all blocks and keys, dotted."""
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{name}.")


def _short(value: object) -> str:
    words = str(value)
    return words if len(words) <= 60 else words[:60] + "…"
