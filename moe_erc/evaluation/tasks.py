"""Tasks of the lm-evaluation-harness by name: found, loaded, and what a model reaches in them.

Several processes all load and run the same. The `eval` extra is imported where there is a task, and not before.
"""

import collections
import contextlib
import difflib
import io
import pathlib
import sys

import jax

from moe_erc.checks import BadInput
from moe_erc.data import bars, paths
from moe_erc.measures.validation import TASK
from moe_erc.tables import print_table

PAPER = {  # the tasks of the ERC paper's two models
    "paper_3b": (
        "arc_challenge", "commonsense_qa", "copa", "boolq", "hellaswag", "openbookqa", "sciq", "social_iqa",
        "winogrande", "mmlu",
    ),
    "paper_15b": ("mmlu", "ceval-valid", "mmlu_pro", "agieval", "bbh", "minerva_math", "gsm8k", "triviaqa"),
}  # fmt: skip
SEED = 1234  # of the examples shown; the harness's own
RESAMPLES = 1000  # for the standard error of a metric that has no formula for it
KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")


def load_tasks(names, directory="", num_fewshot=None):
    """Tasks with their data, as `TaskScores` takes them; {} of no names.

    A name is a task, group or tag of the YAML files in `directory` or of the harness, or a key of PAPER. To index the
    harness's takes half a minute: they are left out if the directory has all. `num_fewshot` examples are shown, where a
    task does not insist on none. ValueError or OSError, of one line, for a name that is unknown or data out of reach.
    """
    if not names:
        return {}
    directory = str(paths.local(directory)) if directory else ""
    if directory and not pathlib.Path(directory).is_dir():
        raise BadInput(f"task_dir: no such directory '{directory}'; give one that has YAML files of tasks")
    for name in names:
        if not isinstance(name, str):
            raise BadInput(f"tasks: {name!r} is no text; give names in quotes, such as ('sciq',)")
    from moe_erc.evaluation import harness

    names = list(dict.fromkeys(task for name in names for task in PAPER.get(name, (name,))))
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
    """What the model of `run(weights)` reaches in the tasks of `load_tasks`, on `limit` documents of each, 0 for all.

    ValueError, before anything is compiled, for a task with a request that the model could not answer.
    """

    def __init__(self, tasks, limit, model, tokenizer, shape_BT):
        self._tasks, self._limit, self._requests = tasks, limit or None, 0
        if tasks:
            from moe_erc.evaluation import harness

            self._language_model = harness.LanguageModel(model, None, tokenizer, shape_BT)
            rehearsal = harness.Rehearsal(model, None, tokenizer, shape_BT)
            for name, task in tasks["tasks"].items():
                try:
                    with _without_bars():
                        self._requests += _rehearse(rehearsal, task, self._limit)
                except BadInput as error:
                    raise BadInput(f"tasks: {name}: {error}; leave it out or train on longer rows") from None

    def run(self, weights) -> dict[str, float]:
        """{"tasks/TASK/METRIC": number}, as `task_metrics` makes it of the answers."""
        return task_metrics(self.answer(weights))

    def answer(self, weights) -> dict:
        """The harness's results, {"results": {task: {"metric,filter": number}}, …}, plain JSON; {} of no tasks."""
        if not self._tasks:
            return {}
        from moe_erc.evaluation import harness

        self._language_model.weights = weights
        for task in self._tasks["tasks"].values():
            task.set_fewshot_seed(SEED)  # every run shows the same
        options = {"limit": self._limit, "bootstrap_iters": RESAMPLES, "log_samples": False}
        shown = bars.bar("Answering tasks", self._requests, "requests") if jax.process_index() == 0 else None
        with shown or contextlib.nullcontext():
            with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for every task
                found = harness.evaluate(lm=self._language_model, task_dict=self._tasks, **options)
            if shown:
                shown.update(self._requests)
        return {key: found[key] for key in KEPT if key in found}


def _without_bars():
    """In a log: the libraries' bars, which write over their line, are left out; what they log is not."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())


def _rehearse(rehearsal, task, limit):
    """Asks the rehearsal all that the model will be asked, and returns how much that is."""
    task.set_fewshot_seed(SEED)
    task.build_all_requests(limit=limit)
    by_kind = collections.defaultdict(list)
    for request in task.instances:
        by_kind[request.request_type].append(request)
    for kind, requests in by_kind.items():
        getattr(rehearsal, kind)(requests)
    return len(task.instances)


def task_metrics(found):
    """{"tasks/TASK/METRIC": number} of the results of a run, without standard errors; a filter but "none" is added."""
    return {
        TASK.of(f"{task}/{'/'.join(part for part in name.split(',') if part != 'none')}").key: value
        for task, values in found.get("results", {}).items()
        for name, value in values.items()
        if isinstance(value, int | float) and "," in name and "_stderr," not in name
    }


def print_tasks(found: dict) -> None:
    """The results of `TaskScores.answer` as tables, of tasks and of groups."""
    for kind in ("results", "groups"):
        if kind in found:
            columns = ("task", "metric", "value", "stderr", "filter", "n-shot", "version")
            rows = [row for task in found[kind] for row in _rows(found, kind, task)]
            print_table("Tasks" if kind == "results" else "Groups of tasks", columns, rows)


def _rows(found, kind, task):
    """A row per metric of a task or a group."""
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
