"""How a run goes on: what its checkpoint says, what has changed since, and which text it reads.

`training/identity.py` decides which keys may change. A run goes on with the text that it was begun
with, as it lies in the cache, whatever has become of the sources. Another text is refused; where it
is allowed, it is said and kept in the run's history.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from moe_erc.checks import BadInput
from moe_erc.data import cache, origin, text
from moe_erc.data.mixture import whole_weights
from moe_erc.data.shards import is_pattern
from moe_erc.data.tokenizer import load as load_tokenizer
from moe_erc.losses.objective import Objective
from moe_erc.model.config import ModelConfig
from moe_erc.model.transformer import Transformer
from moe_erc.training.identity import (
    CONTENT,
    METHOD,
    SCHEDULE,
    Change,
    check_names,
    check_same_run,
    differences,
    is_allowed,
    rule_of,
)
from moe_erc.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from moe_erc.training.state import initializer

TRAIN_ON = (
    "use another --workdir, or train on with other text by --config.resume.allow=\"('data',)\""
)


@dataclasses.dataclass(frozen=True)
class Earlier:
    """What a run has done before it is started. Without a checkpoint that is nothing.

    step: the optimizer steps done.
    rows: the training rows read so far, whatever the batch sizes were; the data go on behind them.
    config: the checkpoint's, as in `configs/base.py`.
    data: `Corpus.record` of the checkpoint's text.
    history: the changes before, each as {"from_step", "key", "before", "after"}.
    changes: between the checkpoint's configuration and the one that the run goes on with.
    """

    step: int = 0
    rows: int = 0
    config: Mapping = dataclasses.field(default_factory=dict)
    data: Mapping = dataclasses.field(default_factory=dict)
    history: tuple[Mapping, ...] = ()
    changes: tuple[Change, ...] = ()

    def row_at(self, step: int, batch_size: int) -> int:
        """How many rows are read before step `step` + 1; `step` is at least `self.step`."""
        return self.rows + (step - self.step) * batch_size

    def history_with(self, changes: Sequence[Change]) -> list[dict]:
        """The history for the next checkpoints."""
        added = [{"from_step": self.step + 1} | change._asdict() for change in changes]
        return [*self.history, *added]


def read(meta: Mapping, step: int, defaults: Mapping | None = None) -> Earlier:
    """What a checkpoint's JSON says of its run.

    defaults: a whole configuration, for keys that came after the checkpoint was made.

    BadInput for a checkpoint of a version that says less of itself.
    """
    try:
        config = _filled(meta["config"], defaults or {})
        data = meta["data"]
        # Checkpoints from before rows were counted: every batch had the size of the configuration.
        rows = meta.get("rows", step * config["train"]["batch_size"])
        data["tokenizer"]
    except (KeyError, TypeError) as error:
        raise BadInput(
            f"the checkpoint of step {step} is of another version of moe_erc ({error}): use that"
        ) from None
    return Earlier(step, rows, config, data, tuple(meta.get("history", ())))


def compare(earlier: Earlier, config: Mapping) -> Earlier:
    """`earlier` with the changes that `config` makes.

    BadInput, which names the first difference, for a change that `config.resume.allow` does not
    allow.
    """
    allow = config["resume"]["allow"]
    check_names(allow, config)
    if not earlier.step:
        return earlier
    changes = check_same_run(_comparable(earlier.config), _comparable(config), allow)
    rows = earlier.rows
    before = earlier.config["data"]["sequence_length"]
    after = config["data"]["sequence_length"]
    # Rows of another length: the data go on behind as many tokens as were read.
    if before != after:
        rows = -(-rows * before // after)
    return dataclasses.replace(earlier, changes=tuple(changes), rows=rows)


def _comparable(config: Mapping) -> dict:
    """The configuration with weights as whole numbers: (0.5, 1) are (1, 2)."""
    weights = whole_weights(config["data"]["weights"])
    return dict(config) | {"data": dict(config["data"]) | {"weights": weights}}


def _filled(config: Mapping, defaults: Mapping) -> dict:
    """The configuration with the defaults of the keys that it does not have."""
    filled = dict(defaults) | dict(config)
    for name, value in filled.items():
        if isinstance(value, Mapping) and isinstance(defaults.get(name), Mapping):
            filled[name] = _filled(value, defaults[name])
    return filled


def check_state(earlier: Earlier, model: Transformer, state: Any) -> None:
    """Refuses an allowed change after which the checkpoint's arrays do not fit the run's state."""
    deciding = ("model.", "routers.", "losses.", "optimizer.")
    if not any(change.key.startswith(deciding) for change in earlier.changes):
        return
    before_model = Transformer(ModelConfig.of(earlier.config), model.mesh)
    steps = earlier.config["train"]["steps"]
    optimizer_config = OptimizerConfig(**earlier.config["optimizer"])
    optimizer = make_optimizer(optimizer_config, steps, before_model.config)
    objective = Objective(earlier.config["losses"], before_model)
    before = _shapes(jax.eval_shape(initializer(before_model, optimizer, 0, objective)))
    after = _shapes(state)
    for name in before | after:
        if before.get(name) != after.get(name):
            keys = [change.key for change in earlier.changes if rule_of(change.key) == METHOD]
            raise BadInput(
                f"resume.allow: {', '.join(keys)} cannot change on the way: "
                f"{name} of the checkpoint is {before.get(name, 'absent')}, "
                f"this run needs {after.get(name, 'none')}; use another --workdir"
            )


def _shapes(state) -> dict[str, str]:
    """{name of a leaf: its dtype and shape in words}."""
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        shapes[name] = f"{leaf.dtype}{list(leaf.shape)}"
    return shapes


class TextGone(BadInput):
    """The text that a run was begun with is neither in the cache nor what its sources give now."""


def open_text(
    earlier: Earlier, config: text.DataConfig, allow: Sequence[str] = (), mend: str = TRAIN_ON
) -> tuple[text.Corpus, list[Change]]:
    """(the text of a run, the changes of its text).

    A new run reads what its sources give. A resumed run reads the text of its beginning, as long as
    that is in the cache and no other text is allowed.

    allow: the names in `resume.allow`. mend: what a message says can be done.

    Raises TextGone where the text of the beginning cannot be had, and BadInput where the
    configuration asks for another text that is not allowed.
    """
    if not earlier.step:
        return text.prepare(config), []
    asked = _content_changes(earlier, config)
    may_change_sources = is_allowed("data.sources", allow)
    may_change_tokenizer = is_allowed("data.tokenizer", allow)
    if not asked and not may_change_sources and not may_change_tokenizer:
        try:
            return _text_of_the_beginning(earlier, config, mend), []
        except BadInput as error:
            raise TextGone(str(error)) from error

    is_other_tokenizer = load_tokenizer(config.tokenizer).identity != earlier.data["tokenizer"]
    if is_other_tokenizer and not may_change_tokenizer:
        raise _another_tokenizer(config, mend)
    corpus = text.prepare(config)
    if _is_same_text(earlier, corpus):
        return corpus, []
    # A tokenizer that changed explains the other text; its sources need no allowance of their own.
    if is_other_tokenizer:
        before = earlier.config["data"]["tokenizer"]
        return corpus, [Change("data.tokenizer", before, config.tokenizer)]
    if may_change_sources:
        before = f"text {earlier.data['corpus']}"
        return corpus, [Change("data.sources", before, f"text {corpus.identity}")]
    raise _another_text(asked, mend)


def open_tokenizer(earlier: Earlier, config: text.DataConfig, mend: str = TRAIN_ON) -> Any:
    """The tokenizer of a run, wherever its file lies now; BadInput if it is not the same one."""
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.identity != earlier.data["tokenizer"]:
        raise _another_tokenizer(config, mend)
    return tokenizer


def _text_of_the_beginning(earlier: Earlier, config: text.DataConfig, mend: str) -> text.Corpus:
    """The text that the run was begun with: out of the cache, else made once more."""
    open_tokenizer(earlier, config, mend)
    corpus = text.reopen(earlier.data, config)
    if corpus is not None:
        _say_what_changed(earlier.data)
        return corpus
    # Before hours are spent on tokenising what is known to be another text.
    _refuse_changed_sources(earlier.data, config, mend)
    corpus = text.prepare(config)
    if not _is_same_text(earlier, corpus):
        raise _another_text([], mend)
    return corpus


def _content_changes(earlier: Earlier, config: text.DataConfig) -> list[Change]:
    """The changes of keys that decide which text is read, except the tokenizer.

    A tokenizer is compared by its content; its path says nothing.
    """
    asked = dataclasses.asdict(config)
    ours = {name: asked[name] for name in earlier.config["data"] if name in asked}
    saved = {name: earlier.config["data"][name] for name in ours}
    changes = []
    for change in differences({"data": saved}, {"data": ours}):
        if rule_of(change.key) == CONTENT and change.key != "data.tokenizer":
            changes.append(change)
    return changes


def _another_tokenizer(config: text.DataConfig, mend: str) -> BadInput:
    return BadInput(
        f"data.tokenizer: {config.tokenizer!r} is not the one the run was trained with: {mend}"
    )


def _is_same_text(earlier: Earlier, corpus: text.Corpus) -> bool:
    record = earlier.data
    if "sources" in record:
        has_same_streams = text.streams_of(record) == text.streams_of(corpus.record)
        has_same_tokenizer = record["tokenizer"] == corpus.record["tokenizer"]
        return has_same_streams and has_same_tokenizer
    # A checkpoint from before the streams were listed has one digest of all that decided a batch.
    data = earlier.config["data"]
    then = text.identity_of(corpus.record, whole_weights(data["weights"]), data["sequence_length"])
    return then == record["corpus"]


def _say_what_changed(record: Mapping) -> None:
    for entry in record["sources"]:
        words = origin.compare(entry["name"], entry["origin"])
        if words:
            print(
                f"data.sources: {entry['name']!r} has changed since the run was begun ({words}): "
                "it goes on with the text that it was begun with, which is in the cache"
            )


def _refuse_changed_sources(record: Mapping, config: text.DataConfig, mend: str) -> None:
    for entry in record.get("sources", ()):
        words = origin.compare(entry["name"], entry["origin"])
        if words and is_pattern(entry["name"]):
            raise TextGone(
                f"data.sources: the shards {entry['name']!r} have changed since the run was begun "
                f"({words}): put them back, {mend}"
            )
        if words:
            back = "put its files back"
            if "versions" in entry["origin"]:
                back = "install those versions"
            raise TextGone(
                f"data.sources: the text that the run was begun with is not in the cache "
                f"({cache.directory_of(config.cache_dir) / entry['directory']}), "
                f"and {entry['name']!r} has changed since ({words}): {back}, {mend}"
            )


def _another_text(changed: Sequence[Change], mend: str) -> BadInput:
    if not changed:
        return BadInput(
            f"data.sources: what they give now is not the text that the run was begun with: {mend}"
        )
    key, before, after = changed[0]
    return BadInput(
        f"the checkpoint was made with {key} = {before}, this run has {after}, "
        f"which is other text: set {key} back, {mend}"
    )


def print_changes(earlier: Earlier, changes: Sequence[Change]) -> None:
    """Prints one line about the changes that are not of the schedule, with their first step."""
    others = [change for change in changes if change.key not in SCHEDULE]
    if not others:
        return
    line = f"from step {earlier.step + 1} on: {', '.join(map(str, others))}"
    if any(change.key == "train.batch_size" for change in others):
        line += (
            f"; the data go on behind the {earlier.rows:,} rows that were read, "
            "the schedule by steps"
        )
    elif any(change.key == "data.sequence_length" for change in others):
        line += f"; the data go on at row {earlier.rows:,}, behind as many tokens as were read"
    print(line)


def print_schedule(earlier: Earlier, config: Mapping, updates: int) -> None:
    """Prints one line about what a change of the schedule does to the learning rate.

    updates: the number of updates that the schedule has counted.
    """
    changes = [change for change in earlier.changes if change.key in SCHEDULE]
    if not changes or config["train"]["steps"] <= earlier.step:
        return
    before = _rates(earlier.config)
    after = _rates(config)
    line = (
        f"from step {earlier.step + 1} on: {', '.join(map(str, changes))}: "
        f"the learning rate of that step is {after(updates)}; "
        f"it would have been {before(updates)}, the last one was {before(max(updates - 1, 0))}"
    )
    print(line + _hint(changes, config))


def _hint(changes: Sequence[Change], config: Mapping) -> str:
    """How a run is extended without a jump of the rate; "" where the rate does not jump."""
    name = config["optimizer"]["schedule"]
    is_stretched = name in ("cosine", "linear")
    if not is_stretched or all(change.key != "train.steps" for change in changes):
        return ""
    steps = config["train"]["steps"]
    return f" (the {name} schedule now spans {steps} steps; constant and wsd can be extended)"


def _rates(config: Mapping):
    """A function: updates done -> the rate of the next update, in words."""
    peak = config["optimizer"]["learning_rate"]
    optimizer = OptimizerConfig(**config["optimizer"])
    schedule = learning_rate_schedule(optimizer, config["train"]["steps"])

    def rate(updates: int) -> str:
        value = float(schedule(updates))
        return f"{value:.3g} ({value / peak:.2f} of the peak)"

    return rate


def history_lines(history: Sequence[Mapping]) -> list[str]:
    """The changes of a run on its way, one line per change."""
    lines = []
    for entry in history:
        change = Change(entry["key"], entry["before"], entry["after"])
        lines.append(f"from step {entry['from_step']} on: {change}")
    return lines
