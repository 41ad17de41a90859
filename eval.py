"""Evaluates a run, or several, and tells whether the router of any MoE is coupled to its experts.

    python eval.py --workdir=runs/erc-tiny                loss, load and coupling as tables, and in eval.json
    python eval.py --workdir=runs/erc-tiny --coupling     all of its coupling: coupling.json, coupling.md, figures/
    python eval.py --checkpoint=OLMoE-1B-7B --coupling    that of a Hugging Face MoE, into coupling/OLMoE-1B-7B
    python eval.py --workdir=runs/erc-tiny --figures      figures/ and report.html; of runs A,B, into comparison
    python eval.py --workdir=runs/erc-tiny --tasks=sciq   what it reaches in these, and tasks.json; or --tasks=paper_3b

The model is the newest checkpoint's. A workdir may be gs://bucket/path; on several processes (docs/launch.md) the
first one prints and writes. Wrong input is one line and exit code 2.
"""

from absl import flags
from etils import epath

from moe_erc import command_line, processes, sharding
from moe_erc.analysis.report import print_report, write_report
from moe_erc.analysis.survey_report import report_survey
from moe_erc.evaluation.tasks import load_tasks, print_tasks
from moe_erc.hf.inspect import open_moe
from moe_erc.runs import open_run

WORKDIR = flags.DEFINE_list("workdir", [], "directories of runs of train.py")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "a local directory of a Hugging Face MoE; with --coupling")
COUPLING = flags.DEFINE_bool("coupling", False, "all there is to know of router rows and gates")
FIGURES = flags.DEFINE_bool("figures", False, "figures of the run, or of several side by side")
OUTPUT = flags.DEFINE_string("output", None, "where --coupling and --figures write; see above for the default")
TASKS = flags.DEFINE_list("tasks", [], "of the lm-evaluation-harness; paper_3b and paper_15b are the ERC paper's")
TASK_DIR = flags.DEFINE_string("task_dir", "", "a directory of YAML files of more tasks")
NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "examples shown; by default the task's own number", lower_bound=0
)
LIMIT = flags.DEFINE_integer("limit", 0, "documents of each task, 0 is all", lower_bound=0)
WINDOWS = flags.DEFINE_integer("windows", None, "windows of each domain, 0 is all; by default the run's own number")


def main(_):
    with command_line.refusing_bad_input(), processes.ending_together():
        check_flags()
        moe = CHECKPOINT.value and open_moe(CHECKPOINT.value)
        processes.initialize()
        sharding.use_cpu_cores()
        processes.mute_all_but_first()
        tasks = load_tasks(TASKS.value, TASK_DIR.value, NUM_FEWSHOT.value)
    if moe:
        report_survey(output(f"coupling/{moe.name}"), moe.name, moe, moe.layers)
        return
    evaluated = {}
    for workdir in WORKDIR.value:
        with command_line.refusing_bad_input(), processes.ending_together():
            run = open_run(epath.Path(workdir))
            layers = run.router_and_gates() if COUPLING.value else None
        print(f"{workdir}: step {run.step}")
        if COUPLING.value:
            report_survey(output(workdir), workdir, layers, range(run.model.config.layers))
        if TASKS.value:
            with command_line.refusing_bad_input():
                reached = run.in_tasks(tasks, LIMIT.value)
            print_tasks(reached)
            write_report(run.workdir / "tasks.json", reached)
        if FIGURES.value or not (COUPLING.value or TASKS.value):
            evaluated[workdir] = evaluate(run)
    if FIGURES.value:
        drawing().write_run_report(output("comparison" if len(evaluated) > 1 else workdir), evaluated)


def check_flags():
    if bool(WORKDIR.value) == bool(CHECKPOINT.value):
        raise ValueError("--workdir, --checkpoint: give one of them, the directory of a run or of a Hugging Face MoE")
    if CHECKPOINT.value and (FIGURES.value or TASKS.value or not COUPLING.value):
        raise ValueError(f"--checkpoint={CHECKPOINT.value}: a Hugging Face MoE has --coupling, and nothing else")
    if OUTPUT.value and COUPLING.value and len(WORKDIR.value) > 1:
        raise ValueError(f"--output={OUTPUT.value}: --coupling writes one run there; leave it out, or name one workdir")
    if FIGURES.value or COUPLING.value:
        drawing()


def drawing():
    """The module that draws; refuses if its extra is not installed."""
    from moe_erc.analysis import run_report

    return run_report


def output(default):
    return epath.Path(OUTPUT.value or default)


def evaluate(run):
    """Prints and writes the report; returns what --figures draws."""
    windows = run.config["eval"]["report_windows"] if WINDOWS.value is None else WINDOWS.value
    report = run.report(windows)
    print_report(report)
    write_report(run.workdir / "eval.json", report)
    return run.to_draw(report, windows) if FIGURES.value else None


if __name__ == "__main__":
    command_line.run(main)
