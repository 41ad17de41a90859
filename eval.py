"""Evaluates a run, or several runs, or a Hugging Face OLMoE.

    python eval.py --workdir=runs/erc-tiny
        prints tables of loss, load and coupling, and writes eval.json
    python eval.py --workdir=runs/erc-tiny --figures
        writes figures/ and report.html as well; those of runs A,B go into comparison/
    python eval.py --workdir=runs/erc-tiny --tasks=sciq
        prints the scores in tasks and writes tasks.json; --tasks=paper_3b names many at once

--checkpoint=DIR of an OLMoE takes --tasks too. A workdir may be gs://bucket/path. Bad input ends in
one line, with exit code 2. `python -m moe_erc.diagnose DIR` measures the coupling of a run, or of
any Hugging Face MoE, in detail.
"""

from absl import flags

from configs import base
from moe_erc import sharding
from moe_erc.checks import BadInput
from moe_erc.data import paths
from moe_erc.diagnosis.report import write_report
from moe_erc.diagnosis.tables import print_found
from moe_erc.evaluation.tasks import load_tasks
from moe_erc.launch import command_line, compilation_cache, processes
from moe_erc.resume import history_lines
from moe_erc.runs import open_checkpoint, open_run

WORKDIR = flags.DEFINE_string(
    "workdir", "", "Directories of runs of train.py, as --workdir=runs/a,runs/b"
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A local directory of a Hugging Face OLMoE, as --checkpoint=OLMoE-1B-7B"
)
FIGURES = flags.DEFINE_bool(
    "figures", False, "Figures of the run, or of several side by side: --figures"
)
OUTPUT = flags.DEFINE_string(
    "output", None, "Where --figures and --tasks write, as --output=found; else as above"
)
WINDOWS = flags.DEFINE_integer(
    "windows",
    None,
    "Windows of each domain, as --windows=8, 0 is all; by default as in the run",
    lower_bound=0,
)
TASKS = flags.DEFINE_list(
    "tasks",
    [],
    "Of the lm-evaluation-harness, as --tasks=sciq,copa; paper_3b, paper_15b: of the ERC paper",
)
TASK_DIR = flags.DEFINE_string(
    "task_dir", "", "A directory of YAML files of more tasks, as --task_dir=my_tasks"
)
NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Examples shown, as --num_fewshot=5; else the task's own", lower_bound=0
)
LIMIT = flags.DEFINE_integer(
    "limit", 0, "Documents of each task, as --limit=100; 0 is all", lower_bound=0
)


def main(_):
    with command_line.refusing_bad_input(), processes.ending_together():
        tasks = set_up()
    evaluated = {}
    for place in places():
        opened = open_place(place)
        if TASKS.value:
            ask_tasks(opened, tasks)
        if is_report_wanted():
            report = write_evaluation(opened)
            evaluated[place] = opened.to_draw(report, WINDOWS.value) if FIGURES.value else None
    if FIGURES.value:
        draw(evaluated)


def set_up():
    """Check the flags, set up devices, and load the tasks."""
    check_flags()
    processes.initialize()
    compilation_cache.enable()
    sharding.use_cpu_cores()
    processes.mute_all_but_first()
    return load_tasks(TASKS.value, TASK_DIR.value, NUM_FEWSHOT.value)


def check_flags():
    given = CHECKPOINT.value
    if bool(WORKDIR.value) == bool(given):
        raise BadInput(
            "--workdir, --checkpoint: give one of them, "
            "the directory of a run or of a Hugging Face MoE"
        )
    if given and is_report_wanted():
        raise BadInput(f"--checkpoint={given}: has --tasks, but no --figures; give --tasks")
    if len(places()) > 1 and OUTPUT.value and not FIGURES.value:
        raise BadInput(f"--output={OUTPUT.value}: is for one run; name one workdir")
    if OUTPUT.value and output("").exists() and not output("").is_dir():
        raise BadInput(f"--output={OUTPUT.value}: is a file; name a directory")
    if FIGURES.value:
        # The import fails here, in one line, if the extra `plot` is missing.
        from moe_erc.diagnosis import figures  # noqa: F401


def places():
    """The directories to evaluate."""
    return paths.several(WORKDIR.value) if WORKDIR.value else [CHECKPOINT.value]


def is_report_wanted():
    """Whether losses, load and coupling are wanted, and not tasks alone."""
    return FIGURES.value or not TASKS.value


def output(default):
    return paths.absolute(OUTPUT.value or default)


def open_place(place):
    """The model of a run or of a checkpoint; prints which one it is."""
    with command_line.refusing_bad_input(), processes.ending_together():
        if CHECKPOINT.value:
            opened = open_checkpoint(place)
        else:
            opened = open_run(place, base.get_config().to_dict(), with_text=is_report_wanted())
    print(place if opened.step is None else f"{place}: step {opened.step}")
    if WORKDIR.value:
        for line in history_lines(opened.earlier.history):
            print(line)
    return opened


def ask_tasks(opened, tasks):
    """Print the scores of the model in the tasks, and write tasks.json."""
    with command_line.refusing_bad_input():
        reached = opened.print_tasks(tasks, LIMIT.value)
        write_report(output(opened.directory) / "tasks.json", reached)


def write_evaluation(opened):
    """Print and write eval.json, and return it."""
    path = opened.directory / "eval.json"
    report = opened.report(WINDOWS.value)
    print_found(report["measures"])
    warning = opened.compare_text(path, report)
    if warning:
        print(warning)
    write_report(path, report)
    return report


def draw(evaluated):
    """Write figures and report.html, of one run or of several side by side."""
    from moe_erc.diagnosis.documents import write_run_report

    default = "comparison" if len(evaluated) > 1 else next(iter(evaluated))
    write_run_report(output(default), evaluated)


if __name__ == "__main__":
    command_line.run(main)
