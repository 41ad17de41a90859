"""Is the difference real? Runs what is missing of a study, and says the verdict.

    python study.py --study=studies/coupling_small.py --jobs=2    two runs at a time, a core each
    python study.py --study=studies/coupling_small.py --report    tables, figures, from rows alone

A study is a file with arms, seeds, an outcome and a margin (docs/studies.md). A finished run is a
row of studies/rows/NAME.jsonl. Started again, it goes on with what is missing. Several machines may
work on one study in a directory that they share.
"""

import pathlib
import sys

from absl import flags

from moe_erc.checks import BadInput
from moe_erc.launch import command_line
from moe_erc.study import arms, report, rows, run

ROOT = pathlib.Path(__file__).parent
STUDY = flags.DEFINE_string(
    "study", None, "The file of the study, as --study=studies/coupling_small.py"
)
JOBS = flags.DEFINE_integer(
    "jobs", 1, "Runs side by side, as --jobs=2; above 1 each has a core of its own", 1
)
SEEDS = flags.DEFINE_integer(
    "seeds", None, "Runs of each arm, as --seeds=4; by default those of the study", 2
)
REPORT = flags.DEFINE_bool("report", False, "Runs nothing; writes tables and figures: --report")
RUNS = flags.DEFINE_string(
    "runs", "runs/studies", "Where the directories of runs are, as --runs=/scratch/studies"
)
DOCS = flags.DEFINE_string(
    "docs", "docs", "Where --report writes results.md and figures/, as --docs=found"
)


def main(_):
    with command_line.refusing_bad_input():
        if STUDY.value is None:
            raise BadInput("--study: name the file of a study, such as studies/coupling_small.py")
        plan = arms.open_plan(STUDY.value, SEEDS.value)
        # The A/A study of this size comes first: it says whether the verdicts can be trusted.
        plans = [plan.aa, plan] if plan.aa else [plan]

        if REPORT.value:
            for each in plans:
                print(report.write(each, pathlib.Path(DOCS.value)))
            return

        # Everything is checked before anything is run.
        for each in plans:
            run.check(each, places(each))

        failed = []
        with run.Stop() as stop:
            for each in plans:
                if not stop.signal:
                    failed += run.run_missing(each, places(each), JOBS.value, stop)

        for each in plans:
            print(report.to_print(each, rows.collect(each, places(each).runs)))
    if stop.signal:
        sys.exit(128 + stop.signal)
    if failed:
        names = ", ".join(failed)
        sys.exit(f"error: {len(failed)} runs failed: {names}; output.txt of each has the reason")


def places(plan):
    """Where the runs of a study are, and what trains them."""
    return run.Places(pathlib.Path(RUNS.value) / plan.name, ROOT / "train.py")


if __name__ == "__main__":
    command_line.run(main)
