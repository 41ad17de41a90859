"""What fails beside the training itself comes after the checkpoint of its step, and is made up for on return."""

import json
import shutil
import signal
import textwrap

import pytest

from moe_erc.training.checkpoint import Checkpoints
from tests import script

STEPS = 4
FAILING = """
    import runpy
    from moe_erc.evaluation.generate import Generator
    from moe_erc.training import metrics

    def fail(*_, **__):
        raise {error}

    {place} = fail
    runpy.run_path("train.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def arguments(text_directory, tmp_path_factory):
    return [
        "--config=configs/erc.py:debug",
        f"--config.data.sources=('{text_directory}',)",
        f"--config.data.cache_dir={tmp_path_factory.mktemp('cache[1]')}",  # a pattern that nothing else matches
        "--config.data.validation_fraction=0.1",
        f"--config.train.steps={STEPS}",
        "--config.eval.every=2",
        "--config.checkpoint.every=2",
        "--config.log.every=1",
    ]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lr[1e-3]")
    code, printed = script.run("train.py", [*arguments, f"--workdir={workdir}"], workdir / "out")
    assert code == 0, printed
    return workdir


def metrics(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("speed/")} for line in lines]


def newest(workdir):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.newest_intact()


def test_a_workdir_with_brackets_is_evaluated_and_exported(whole, tmp_path):
    assert newest(whole) == STEPS
    directory = tmp_path / "olmoe[1]"
    code, printed = script.run("moe_erc.export", [whole, directory], tmp_path / "out")
    assert code == 0 and (directory / "model.safetensors").is_file(), printed


@pytest.mark.parametrize(
    ("place", "error", "code", "words"),
    [
        ("Generator.run", "UnicodeEncodeError('ascii', 'x', 0, 1, 'mine')", 1, "UnicodeEncodeError"),
        ("Generator.run", "OSError('mine')", 1, "error: mine; the last good checkpoint is of step 2"),
        ("metrics.LocalJsonLines.write", "OSError('mine')", 1, "error: mine; the last good checkpoint is of step 2"),
        ("metrics._TensorBoard.write", "RuntimeError('mine')", 0, "TensorBoard is switched off (mine)"),
    ],
)
def test_what_fails_at_a_step_has_its_checkpoint_behind_it(place, error, code, words, arguments, whole, tmp_path):
    program, workdir = tmp_path / "failing.py", tmp_path / "run"
    program.write_text(textwrap.dedent(FAILING).format(place=place, error=error))
    everything = [*arguments, f"--workdir={workdir}", "--config.log.every=2"]
    ended, printed = script.run(program, everything, tmp_path / "out")
    assert ended == code and words in printed, printed
    assert newest(workdir) == (STEPS if code == 0 else 2)
    if "Generator" in place:
        code, printed = script.run("train.py", [*arguments, f"--workdir={workdir}"], tmp_path / "out")
        assert code == 0, printed
        validated = [line for line in metrics(workdir) if "validation/mean" in line]
        assert validated == [line for line in metrics(whole) if "validation/mean" in line]


@pytest.mark.parametrize("step", [2, STEPS])
def test_killed_between_a_checkpoint_and_its_evaluation(step, arguments, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / "report.json").unlink()
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(workdir / "checkpoints" / str(later), ignore_errors=True)
    kept = [
        line
        for line in (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
        if json.loads(line)["step"] <= step and not (json.loads(line)["step"] == step and "validation/mean" in line)
    ]
    (workdir / "metrics.jsonl").write_text("".join(kept))
    code, printed = script.run("train.py", [*arguments, f"--workdir={workdir}"], tmp_path / "out")
    assert code == 0 and printed.count(f"step {step}: validation") == 1, printed
    assert metrics(workdir) == metrics(whole)
    assert (workdir / "report.json").read_text() == (whole / "report.json").read_text()


def test_a_report_that_cannot_be_written_is_printed(arguments, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / "report.json").unlink()
    (workdir / "report.json").mkdir()
    code, printed = script.run("train.py", [*arguments, f"--workdir={workdir}"], tmp_path / "out")
    assert code == 1 and "last good checkpoint is of step 4" in printed and "Validation" in printed, printed
    assert "Traceback" not in printed


def test_told_to_stop_at_a_step_that_is_evaluated_it_saves_and_leaves(arguments, whole, tmp_path):
    program, workdir = tmp_path / "stopped.py", tmp_path / "run"
    program.write_text(
        textwrap.dedent("""
        import os, runpy, signal
        from moe_erc.training import progress

        flush = progress.Progress.flush

        def stop(self):
            flush(self)
            os.kill(os.getpid(), signal.SIGTERM)

        progress.Progress.flush = stop  # at step 1: to be read after step 2
        runpy.run_path("train.py", run_name="__main__")
    """)
    )
    code, printed = script.run(program, [*arguments, f"--workdir={workdir}"], tmp_path / "out")
    assert code == 128 + signal.SIGTERM and newest(workdir) == 2 and "step 2: validation" not in printed, printed
    code, printed = script.run("train.py", [*arguments, f"--workdir={workdir}"], tmp_path / "out")
    assert code == 0 and metrics(workdir) == metrics(whole), printed
