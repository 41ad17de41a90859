"""Tasks of the lm-evaluation-harness: they are found by name and loaded, and a model is scored.

Of several processes all load and run the same tasks. The extra `eval` is imported only where there
is a task.
"""

import collections
import contextlib
import difflib
import io
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from moe_erc.checks import BadInput
from moe_erc.data import bars, paths
from moe_erc.data.tokenizer import Tokenizer
from moe_erc.measures.validation import TASK
from moe_erc.model.transformer import Transformer
from moe_erc.tables import print_table

PAPER = {  # the tasks of the ERC paper's two models
    "paper_3b": (
        "arc_challenge", "commonsense_qa", "copa", "boolq", "hellaswag", "openbookqa", "sciq",
        "social_iqa", "winogrande", "mmlu",
    ),
    "paper_15b": (
        "mmlu", "ceval-valid", "mmlu_pro", "agieval", "bbh", "minerva_math", "gsm8k", "triviaqa",
    ),
}  # fmt: skip
SEED = 1234  # of the few-shot examples; it is that of the harness
RESAMPLES = 1000  # for the standard error of a metric that has no formula for it
# What is kept of the harness's results.
KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "versions",
    "n-shot",
    "higher_is_better",
    "n-samples",
)


def load_tasks(
    names: Sequence[str], directory: str = "", num_fewshot: int | None = None
) -> dict[str, Any]:
    """Load tasks with their data for `TaskScores`; {} if there are no names.

    Args:
      names: tasks, groups or tags of the YAML files in `directory` or of the harness, or keys of
        PAPER. The tasks of the harness are indexed, which takes half a minute, only if the
        directory does not have all names.
      directory: of YAML files; "" is none
      num_fewshot: how many examples are shown; a task that sets 0 itself shows none

    Raises:
      BadInput: for an unknown name.
      OSError: for data that cannot be reached.
    """
    if not names:
        return {}
    directory = str(paths.local(directory)) if directory else ""
    if directory and not pathlib.Path(directory).is_dir():
        raise BadInput(
            f"task_dir: no such directory '{directory}'; give one that has YAML files of tasks"
        )
    for name in names:
        if not isinstance(name, str):
            raise BadInput(f"tasks: {name!r} is no text; give names in quotes, such as ('sciq',)")
    from moe_erc.evaluation import harness

    wanted = {}  # a dict keeps the order and drops what is named twice
    for name in names:
        wanted |= dict.fromkeys(PAPER.get(name, (name,)))
    names = list(wanted)
    manager = harness.TaskManager(include_path=directory, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = harness.TaskManager(include_path=directory or None)
    for name in names:
        if name not in manager.all_tasks:
            nearest = difflib.get_close_matches(name, [*PAPER, *manager.all_tasks], n=3, cutoff=0)
            raise BadInput(f"tasks: there is no {name!r}; the nearest are {', '.join(nearest)}")
    with _without_bars():
        loaded = manager.load(names)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        shown = own if num_fewshot is None or own == 0 else num_fewshot
        task.set_config(key="num_fewshot", value=shown or 0)
    return loaded


class TaskScores:
    """An evaluator of the tasks of `load_tasks`, on `limit` documents of each, 0 for all.

    BadInput, before any compilation, for a task with a request that the model cannot answer.
    """

    def __init__(
        self,
        tasks: Mapping[str, Any],
        limit: int,
        model: Transformer,
        tokenizer: Tokenizer,
        shape_BT: tuple[int, int],
    ):
        self._tasks = tasks
        self._limit = limit or None
        self._requests = 0
        if not tasks:
            return
        from moe_erc.evaluation import harness

        self._language_model = harness.LanguageModel(model, None, tokenizer, shape_BT)
        rehearsal = harness.Rehearsal(model, None, tokenizer, shape_BT)
        for name, task in tasks["tasks"].items():
            try:
                with _without_bars():
                    self._requests += _rehearse(rehearsal, task, self._limit)
            except BadInput as error:
                raise BadInput(
                    f"tasks: {name}: {error}; leave it out or train on longer rows"
                ) from None

    def run(self, weights: Any) -> dict[str, float]:
        """{"tasks/TASK/METRIC": number}, the answers in the form of `task_metrics`."""
        return task_metrics(self.answer(weights))

    def answer(self, weights: Any) -> dict:
        """The harness's results, {"results": {task: {"metric,filter": number}}, …}, plain JSON.

        {} if there are no tasks.
        """
        if not self._tasks:
            return {}
        from moe_erc.evaluation import harness

        self._language_model.weights = weights
        for task in self._tasks["tasks"].values():
            task.set_fewshot_seed(SEED)  # every run shows the same
        options = {"limit": self._limit, "bootstrap_iters": RESAMPLES, "log_samples": False}
        shown = None
        if jax.process_index() == 0:
            shown = bars.bar("Answering tasks", self._requests, "requests")
        with shown or contextlib.nullcontext():
            # The harness would show a progress bar for every task.
            with contextlib.redirect_stderr(io.StringIO()):
                found = harness.evaluate(lm=self._language_model, task_dict=self._tasks, **options)
            if shown:
                shown.update(self._requests)
        return {key: found[key] for key in KEPT if key in found}


def _without_bars():
    """A context in which libraries show no progress bars in a log, where they would be noise.

    Messages that they log are still shown.
    """
    if sys.stderr.isatty():
        return contextlib.nullcontext()
    return contextlib.redirect_stderr(io.StringIO())


def _rehearse(rehearsal, task, limit):
    """Send all requests of a task to the rehearsal; returns how many there are."""
    task.set_fewshot_seed(SEED)
    task.build_all_requests(limit=limit)
    by_kind = collections.defaultdict(list)
    for request in task.instances:
        by_kind[request.request_type].append(request)
    for kind, requests in by_kind.items():
        getattr(rehearsal, kind)(requests)
    return len(task.instances)


def task_metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """{"tasks/TASK/METRIC": number} of the results of a run, without standard errors.

    The name of a filter follows the metric, unless it is "none".
    """
    metrics = {}
    for task, values in found.get("results", {}).items():
        for name, value in values.items():
            is_metric = "," in name and "_stderr," not in name
            if is_metric and isinstance(value, int | float):
                parts = [part for part in name.split(",") if part != "none"]
                metrics[TASK.of("/".join([task, *parts])).key] = value
    return metrics


def print_tasks(found: dict) -> None:
    """Print the results of `TaskScores.answer` as tables of tasks and of groups."""
    for kind in ("results", "groups"):
        if kind in found:
            columns = ("task", "metric", "value", "stderr", "filter", "n-shot", "version")
            rows = []
            for task in found[kind]:
                rows += _rows(found, kind, task)
            print_table("Tasks" if kind == "results" else "Groups of tasks", columns, rows)


def _rows(found, kind, task):
    """A row for every metric of a task or a group."""
    values = found[kind][task]
    shown = str(values.get("alias", task))
    told = [str(found.get(key, {}).get(task, "")) for key in ("n-shot", "versions")]
    for name, value in values.items():
        metric, comma, filtered = name.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{filtered}", "")
            yield [shown, metric, _number(value), _number(error), filtered, *told]


def _number(value):
    return f"{value:.4f}" if isinstance(value, float) else str(value)
