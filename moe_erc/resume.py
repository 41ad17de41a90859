"""How a run goes on: what its checkpoint says of it, what has changed since, and the text that it reads.

Which key may change is decided in `training/identity.py`. The text of a run is that of its beginning, as it lies in the
cache, whatever has become of the sources; another one is refused, or said and kept in the run's history.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax

from moe_erc.checks import BadInput
from moe_erc.data import cache, origin, text
from moe_erc.data.mixture import whole_weights
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

TRAIN_ON = "use another --workdir, or train on with other text by --config.resume.allow=\"('data',)\""


@dataclasses.dataclass(frozen=True)
class Earlier:
    """What a run has behind it when it is started; without a checkpoint nothing, and `step` is 0."""

    step: int = 0  # optimizer steps done
    rows: int = 0  # training rows read in them, whatever the batch sizes were: where the data go on
    config: Mapping = dataclasses.field(default_factory=dict)  # of the checkpoint, as in configs/base.py
    data: Mapping = dataclasses.field(default_factory=dict)  # `Corpus.record` of its text
    history: tuple[Mapping, ...] = ()  # of changes before: {"from_step", "key", "before", "after"}
    changes: tuple[Change, ...] = ()  # between its configuration and the one that it goes on with

    def row_at(self, step: int, batch_size: int) -> int:
        """The rows that are read before step `step` + 1, which is not before where the run goes on."""
        return self.rows + (step - self.step) * batch_size

    def history_with(self, changes: Sequence[Change]) -> list[dict]:
        """The history for the checkpoints to come."""
        added = [{"from_step": self.step + 1} | change._asdict() for change in changes]
        return [*self.history, *added]


def read(meta: Mapping, step: int, defaults: Mapping | None = None) -> Earlier:
    """Of the JSON of a checkpoint; BadInput for one of a version that says less of itself.

    defaults: a whole configuration, for keys that came after the checkpoint was made.
    """
    try:
        config = _filled(meta["config"], defaults or {})
        data = meta["data"]
        # Checkpoints of before rows were counted: every batch had the size that the configuration says.
        rows = meta.get("rows", step * config["train"]["batch_size"])
        data["tokenizer"]
    except (KeyError, TypeError) as error:
        raise BadInput(f"the checkpoint of step {step} is of another version of moe_erc ({error}): use that") from None
    return Earlier(step, rows, config, data, tuple(meta.get("history", ())))


def compare(earlier: Earlier, config: Mapping) -> Earlier:
    """With what `config` changes; BadInput, naming the first difference, for what it does not allow itself."""
    allow = config["resume"]["allow"]
    check_names(allow, config)
    if not earlier.step:
        return earlier
    changes = check_same_run(_comparable(earlier.config), _comparable(config), allow)
    rows = earlier.rows
    before, after = earlier.config["data"]["sequence_length"], config["data"]["sequence_length"]
    if before != after:  # as many tokens, in rows of another length
        rows = -(-rows * before // after)
    return dataclasses.replace(earlier, changes=tuple(changes), rows=rows)


def _comparable(config: Mapping) -> dict:
    """The configuration with weights as whole numbers: (0.5, 1) are (1, 2)."""
    weights = whole_weights(config["data"]["weights"])
    return dict(config) | {"data": dict(config["data"]) | {"weights": weights}}


def _filled(config: Mapping, defaults: Mapping) -> dict:
    filled = dict(defaults) | dict(config)
    for name, value in filled.items():
        if isinstance(value, Mapping) and isinstance(defaults.get(name), Mapping):
            filled[name] = _filled(value, defaults[name])
    return filled


def check_state(earlier: Earlier, model: Transformer, state) -> None:
    """Refuses an allowed change after which the arrays of the checkpoint are no state of the run any more."""
    if not any(change.key.startswith(("model.", "routers.", "losses.", "optimizer.")) for change in earlier.changes):
        return
    before_model = Transformer(ModelConfig.of(earlier.config), model.mesh)
    optimizer_config = OptimizerConfig(**earlier.config["optimizer"])
    optimizer = make_optimizer(optimizer_config, earlier.config["train"]["steps"], before_model.config)
    objective = Objective(earlier.config["losses"], before_model)
    before = _shapes(jax.eval_shape(initializer(before_model, optimizer, 0, objective)))
    after = _shapes(state)
    for name in before | after:
        if before.get(name) != after.get(name):
            keys = ", ".join(change.key for change in earlier.changes if rule_of(change.key) == METHOD)
            raise BadInput(
                f"resume.allow: {keys} cannot change on the way: {name} of the checkpoint is "
                f"{before.get(name, 'absent')}, this run needs {after.get(name, 'none')}; use another --workdir"
            )


def _shapes(state) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    keystr = jax.tree_util.keystr
    return {keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


class TextGone(BadInput):
    """A run that asks for the text it was begun with, which is neither in the cache nor what its sources give now."""


def open_text(
    earlier: Earlier, config: text.DataConfig, allow: Sequence[str] = (), mend: str = TRAIN_ON
) -> tuple[text.Corpus, list[Change]]:
    """The text of a run, and what changes of it: that of its beginning as long as it is in the cache.

    A new run reads what its sources give. `mend` says what can be done where the text is another one: TextGone, or
    BadInput where the configuration asks for another one.
    """
    if not earlier.step:
        return text.prepare(config), []
    asked = _content_changes(earlier, config)
    if not asked and not is_allowed("data.sources", allow) and not is_allowed("data.tokenizer", allow):
        try:
            return _text_of_the_beginning(earlier, config, mend), []
        except BadInput as error:
            raise TextGone(str(error)) from error
    tokenizer_changed = load_tokenizer(config.tokenizer).identity != earlier.data["tokenizer"]
    if tokenizer_changed and not is_allowed("data.tokenizer", allow):
        raise _another_tokenizer(config, mend)
    corpus = text.prepare(config)
    if _is_same_text(earlier, corpus):
        return corpus, []
    if tokenizer_changed:
        return corpus, [Change("data.tokenizer", earlier.config["data"]["tokenizer"], config.tokenizer)]
    if is_allowed("data.sources", allow):
        return corpus, [Change("data.sources", f"text {earlier.data['corpus']}", f"text {corpus.identity}")]
    raise _another_text(asked, mend)


def open_tokenizer(earlier: Earlier, config: text.DataConfig, mend: str = TRAIN_ON):
    """The tokenizer of a run, wherever its file lies now; BadInput where it is another one."""
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.identity != earlier.data["tokenizer"]:
        raise _another_tokenizer(config, mend)
    return tokenizer


def _text_of_the_beginning(earlier: Earlier, config: text.DataConfig, mend: str) -> text.Corpus:
    open_tokenizer(earlier, config, mend)
    corpus = text.reopen(earlier.data, config)
    if corpus is not None:
        _say_what_changed(earlier.data)
        return corpus
    # Known to be another text before hours are spent on tokenising it.
    _refuse_changed_sources(earlier.data, config, mend)
    corpus = text.prepare(config)
    if not _is_same_text(earlier, corpus):
        raise _another_text([], mend)
    return corpus


def _content_changes(earlier: Earlier, config: text.DataConfig) -> list[Change]:
    ours = dataclasses.asdict(config)
    ours = {name: ours[name] for name in earlier.config["data"] if name in ours}
    saved = {name: earlier.config["data"][name] for name in ours}
    found = differences({"data": saved}, {"data": ours})
    # The path of a tokenizer says nothing, its content does: where the two paths differ, it is compared alone.
    return [change for change in found if rule_of(change.key) == CONTENT and change.key != "data.tokenizer"]


def _another_tokenizer(config: text.DataConfig, mend: str) -> BadInput:
    return BadInput(f"data.tokenizer: {config.tokenizer!r} is not the one the run was trained with: {mend}")


def _is_same_text(earlier: Earlier, corpus: text.Corpus) -> bool:
    record = earlier.data
    if "sources" in record:
        same_streams = text.streams_of(record) == text.streams_of(corpus.record)
        return same_streams and record["tokenizer"] == corpus.record["tokenizer"]
    # Of before the streams were listed: one digest of all that decided a batch.
    data = earlier.config["data"]
    then = text.identity_of(corpus.record, whole_weights(data["weights"]), data["sequence_length"])
    return then == record["corpus"]


def _say_what_changed(record: Mapping) -> None:
    for entry in record["sources"]:
        if words := origin.compare(entry["name"], entry["origin"]):
            print(
                f"data.sources: {entry['name']!r} has changed since the run was begun ({words}): "
                "it goes on with the text that it was begun with, which is in the cache"
            )


def _refuse_changed_sources(record: Mapping, config: text.DataConfig, mend: str) -> None:
    for entry in record.get("sources", ()):
        if words := origin.compare(entry["name"], entry["origin"]):
            back = "install those versions" if "versions" in entry["origin"] else "put its files back"
            raise TextGone(
                f"data.sources: the text that the run was begun with is not in the cache "
                f"({cache.directory_of(config.cache_dir) / entry['directory']}), "
                f"and {entry['name']!r} has changed since ({words}): {back}, {mend}"
            )


def _another_text(changed: Sequence[Change], mend: str) -> BadInput:
    if not changed:
        return BadInput(f"data.sources: what they give now is not the text that the run was begun with: {mend}")
    key, before, after = changed[0]
    return BadInput(
        f"the checkpoint was made with {key} = {before}, this run has {after}, which is other text: "
        f"set {key} back, {mend}"
    )


def print_changes(earlier: Earlier, changes: Sequence[Change]) -> None:
    """One line for what is not of the schedule, with the step from which on it holds."""
    others = [change for change in changes if change.key not in SCHEDULE]
    if not others:
        return
    line = f"from step {earlier.step + 1} on: {', '.join(map(str, others))}"
    if any(change.key == "train.batch_size" for change in others):
        line += f"; the data go on behind the {earlier.rows:,} rows that were read, the schedule by steps"
    elif any(change.key == "data.sequence_length" for change in others):
        line += f"; the data go on at row {earlier.rows:,}, behind as many tokens as were read"
    print(line)


def print_schedule(earlier: Earlier, config: Mapping, updates: int) -> None:
    """One line for what a change of the steps or of the optimizer's schedule does to the learning rate.

    updates: those that the schedule has counted.
    """
    changes = [change for change in earlier.changes if change.key in SCHEDULE]
    if not changes or config["train"]["steps"] <= earlier.step:
        return
    before = _rates(earlier.config)
    after = _rates(config)
    print(
        f"from step {earlier.step + 1} on: {', '.join(map(str, changes))}: the learning rate of that step is "
        f"{after(updates)}; it would have been {before(updates)}, the last one was {before(max(updates - 1, 0))}"
        + _hint(changes, config)
    )


def _hint(changes: Sequence[Change], config: Mapping) -> str:
    """Of how a run is extended without a jump of the rate."""
    stretched = config["optimizer"]["schedule"] in ("cosine", "linear")
    if not stretched or all(change.key != "train.steps" for change in changes):
        return ""
    name = config["optimizer"]["schedule"]
    return f" (the {name} schedule now spans {config['train']['steps']} steps; constant and wsd can be extended)"


def _rates(config: Mapping):
    """updates done -> the rate of the next one in words."""
    peak = config["optimizer"]["learning_rate"]
    schedule = learning_rate_schedule(OptimizerConfig(**config["optimizer"]), config["train"]["steps"])

    def rate(updates: int) -> str:
        value = float(schedule(updates))
        return f"{value:.3g} ({value / peak:.2f} of the peak)"

    return rate


def history_lines(history: Sequence[Mapping]) -> list[str]:
    """The changes of a run on its way, one line a change."""
    return [
        f"from step {entry['from_step']} on: {Change(entry['key'], entry['before'], entry['after'])}"
        for entry in history
    ]
