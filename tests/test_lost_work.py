"""An evaluation or output that fails, fails after the checkpoint of its step and is made up for.

Under the default guard, a run that is terminated and killed ends bit for bit where the undisturbed
run ends. test_resume.py tests the same while spikes are skipped.
"""

import shutil
import signal
import textwrap

import jax
import numpy as np
import pytest

from moe_erc.training.checkpoint import Checkpoints
from tests import script
from tests.written import metrics, saved_state

STEPS = 4
SAMPLED = "--config.eval.prompt=the"  # the other runs draw no sample
# These programs become train.py. All of them save and evaluate at steps 2 and 4.
UNICODE_AT_THE_FIRST_SAMPLE = """
    import runpy
    from moe_erc.evaluation.generate import Generator

    def fail(*_, **__):
        raise UnicodeEncodeError("ascii", "x", 0, 1, "mine")

    Generator.run = fail
    runpy.run_path("train.py", run_name="__main__")
"""
OS_ERROR_AT_THE_FIRST_SAMPLE = """
    import runpy
    from moe_erc.evaluation.generate import Generator

    def fail(*_, **__):
        raise OSError("mine")

    Generator.run = fail
    runpy.run_path("train.py", run_name="__main__")
"""
WRITERS_FAIL = """
    import runpy
    from moe_erc.training import metrics

    write = metrics.LocalJsonLines.write

    def fail_at_the_last_step(self, step, values):
        if step == {steps}:
            raise OSError("mine")
        write(self, step, values)

    def fail(*_, **__):
        raise RuntimeError("of a board")

    metrics.LocalJsonLines.write = fail_at_the_last_step
    metrics._TensorBoard.write = fail
    runpy.run_path("train.py", run_name="__main__")
"""
TERMINATED_AT_STEP_2 = """
    import os, runpy, signal
    from moe_erc.training import progress

    flush = progress.Progress.flush

    def stop(self):
        flush(self)
        os.kill(os.getpid(), signal.SIGTERM)

    progress.Progress.flush = stop  # at step 1: to be read after step 2
    runpy.run_path("train.py", run_name="__main__")
"""
KILLED_AT_STEP_3 = """
    import os, runpy, signal
    from moe_erc.training import progress

    flush = progress.Progress.flush

    def kill(self):
        flush(self)
        self._writer.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    progress.Progress.flush = kill
    runpy.run_path("train.py", run_name="__main__")
"""
KILLED_BEFORE_THE_LAST_EVALUATION = """
    import os, pathlib, runpy, signal, time
    from moe_erc.evaluation.perplexity import Perplexity

    def kill(*_):
        # The checkpoint is written meanwhile.
        while not pathlib.Path("{workdir}", "checkpoints", "{steps}").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    Perplexity.run = kill
    runpy.run_path("train.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def arguments(text_directory, tmp_path_factory):
    return [
        "--config=configs/erc.py:debug",
        f"--config.data.sources=('{text_directory}',)",
        # The name is a glob pattern that does not match itself.
        f"--config.data.cache_dir={tmp_path_factory.mktemp('cache[1]')}",
        "--config.data.validation_fraction=0.1",
        f"--config.train.steps={STEPS}",
        "--config.eval.every=2",
        "--config.checkpoint.every=2",
        "--config.log.every=1",
        "--config.eval.prompt=",
    ]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The workdir of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("lr[1e-3]")
    code, printed = script.run("train.py", [*arguments, f"--workdir={workdir}"], workdir / "out")
    assert code == 0, printed
    return workdir


@pytest.fixture
def run_in(arguments, tmp_path):
    """Runs such a program, or train.py itself, on one workdir.

    Returns (exit code, what it printed).
    """
    workdir = tmp_path / "run"

    def run(program, *changes):
        path = "train.py"
        if program:
            path = tmp_path / "program.py"
            filled = textwrap.dedent(program).format(workdir=workdir, steps=STEPS)
            path.write_text(filled)
        everything = [*arguments, f"--workdir={workdir}", *changes]
        return script.run(path, everything, tmp_path / "out")

    run.workdir = workdir
    return run


def newest(workdir):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.newest_intact()


def validations(workdir):
    return [line for line in metrics(workdir) if "validation/mean" in line]


def test_a_workdir_with_brackets_is_evaluated_and_exported(whole, tmp_path):
    assert newest(whole) == STEPS
    directory = tmp_path / "olmoe[1]"
    code, printed = script.run("moe_erc.export", [whole, directory], tmp_path / "out")
    assert code == 0 and (directory / "model.safetensors").is_file(), printed


def test_what_fails_at_a_step_has_its_checkpoint_behind_it(run_in, whole):
    code, printed = run_in(UNICODE_AT_THE_FIRST_SAMPLE, SAMPLED, "--config.log.every=2")
    assert code == 1 and "UnicodeEncodeError" in printed, printed
    assert newest(run_in.workdir) == 2

    # A failing board does not end the run, so it reaches the last step. There it fails at the
    # metrics file.
    code, printed = run_in(WRITERS_FAIL, "--config.log.every=2")
    assert "TensorBoard is switched off (of a board)" in printed, printed
    assert code == 1 and "error: mine; the last good checkpoint is of step 4" in printed, printed
    assert newest(run_in.workdir) == STEPS

    code, printed = run_in(OS_ERROR_AT_THE_FIRST_SAMPLE, SAMPLED)
    assert code == 1 and "error: mine; the last good checkpoint is of step 4" in printed, printed
    assert newest(run_in.workdir) == STEPS

    code, printed = run_in(None)
    assert code == 0, printed
    assert validations(run_in.workdir) == validations(whole)


def test_terminated_and_killed_it_ends_where_the_undisturbed_run_ends(run_in, whole):
    # A run that is told to stop at a step with an evaluation saves, and leaves without evaluating.
    code, printed = run_in(TERMINATED_AT_STEP_2)
    assert code == 128 + signal.SIGTERM and "step 2: validation" not in printed, printed
    assert newest(run_in.workdir) == 2

    # The next start makes up for the evaluation. Step 3, whose metrics are on the disk, is lost.
    code, printed = run_in(KILLED_AT_STEP_3)
    assert code == -signal.SIGKILL and printed.count("step 2: validation") == 1, printed
    assert newest(run_in.workdir) == 2
    assert metrics(run_in.workdir)[-1]["step"] == 3

    code, printed = run_in(KILLED_BEFORE_THE_LAST_EVALUATION)
    assert code == -signal.SIGKILL and ": validation" not in printed, printed
    assert newest(run_in.workdir) == STEPS
    assert [line["step"] for line in validations(run_in.workdir)] == [2]

    code, printed = run_in(None)
    assert code == 0 and printed.count(f"step {STEPS}: validation") == 1, printed
    assert metrics(run_in.workdir) == metrics(whole)
    step, state = saved_state(whole, STEPS)
    found_step, found_state = saved_state(run_in.workdir, STEPS)
    assert found_step == step == STEPS
    jax.tree.map(np.testing.assert_array_equal, state, found_state)
    assert (run_in.workdir / "report.json").read_text() == (whole / "report.json").read_text()


def test_a_report_that_cannot_be_written_is_printed(arguments, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / "report.json").unlink()
    (workdir / "report.json").mkdir()
    code, printed = script.run("train.py", [*arguments, f"--workdir={workdir}"], tmp_path / "out")
    assert (
        code == 1 and "last good checkpoint is of step 4" in printed and "Validation" in printed
    ), printed
    assert "Traceback" not in printed
