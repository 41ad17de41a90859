"""A run that was killed, terminated and interrupted ends bit for bit as the undisturbed run."""

import json
import os
import signal
import time

import jax
import numpy as np
import pytest

from moe_erc.training.checkpoint import Checkpoints
from tests import script
from tests.tolerance import assert_close, within
from tests.written import metrics, saved_state

STEPS = 160
EVALUATED = 80  # steps between evaluations
SAVED = 15  # steps between checkpoints
# Steps whose loss is a spike are skipped, so that every comparison includes the guard's memory of
# earlier losses.
SKIPPING = [
    "--config.guard.spike=skip",
    "--config.guard.zscore=0.1",  # not much of a spike: there are some
    "--config.guard.window=2",
    "--config.guard.limit=1000",
]


@pytest.fixture(scope="module")
def arguments(text_directory, tmp_path_factory):
    """Arguments of a run of a few seconds, long enough to be interrupted."""
    return [
        "--config=configs/erc.py:debug",
        f"--config.data.sources=('{text_directory}',)",
        f"--config.data.cache_dir={tmp_path_factory.mktemp('cache')}",
        "--config.data.validation_fraction=0.1",
        f"--config.train.steps={STEPS}",
        f"--config.checkpoint.every={SAVED}",
        f"--config.eval.every={EVALUATED}",
        # This is after every interruption, and its third step would be after the end.
        f"--config.train.profile_step={STEPS - 1}",
        "--config.log.tensorboard=False",
    ]


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, printed = script.run(
        "train.py", [*arguments, *SKIPPING, f"--workdir={workdir}"], workdir / "out"
    )
    assert (
        code == 0 and "standard deviations above its recent mean, the step was skipped" in printed
    ), printed
    return workdir


def refuse_a_second(first, everything, workdir, output):
    """Starts a second run in the directory of a running one, which waits in the meantime."""
    written = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (written.exists() and written.stat().st_size):
        assert first.is_alive() and time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)  # however long the second takes, the first has steps left
    code, printed = script.run("train.py", everything, output)
    assert first.is_alive()
    os.kill(first.pid, signal.SIGCONT)
    assert code == 2, printed
    assert f"a run is writing to {workdir}/checkpoints (process {first.pid} on " in printed, printed


def test_killed_terminated_and_interrupted_while_spikes_are_skipped(
    arguments, undisturbed, tmp_path
):
    # This run draws no samples, unlike the undisturbed one, and a second run in its directory is
    # refused. Neither changes the result. test_lost_work.py has the default guard, and a kill after
    # a resumption.
    everything = [*arguments, *SKIPPING, "--config.eval.prompt=", f"--workdir={tmp_path}"]
    for step, number, code in (
        (30, signal.SIGKILL, -signal.SIGKILL),
        (60, signal.SIGTERM, 128 + signal.SIGTERM),
        (90, signal.SIGINT, 128 + signal.SIGINT),
    ):
        process = script.start("tests/train_slowly.py", everything, tmp_path / "out")
        if number == signal.SIGKILL:
            refuse_a_second(process, everything, tmp_path, tmp_path / "second")
        assert script.hit(process, tmp_path, step, number) == code, (tmp_path / "out").read_text()
    code, printed = script.run("train.py", everything, tmp_path / "out")
    assert code == 0, printed
    step, state = saved_state(undisturbed, STEPS)
    lines = metrics(undisturbed)
    found_step, found_state = saved_state(tmp_path, STEPS)
    assert found_step == step == STEPS
    jax.tree.map(np.testing.assert_array_equal, state, found_state)
    assert metrics(tmp_path) == lines
    counts = [line["guard/skipped"] for line in lines if "guard/skipped" in line]
    assert 0 < counts[-1] == state.guard["skipped"] < STEPS and counts == sorted(counts)


def test_the_trace_is_written_even_if_the_run_ends_in_it(undisturbed):
    assert list((undisturbed / "profile").rglob("*.xplane.pb"))


def test_a_finished_run_says_its_report_again(arguments, undisturbed):
    before = (undisturbed / "report.json").read_text()
    code, printed = script.run(
        "train.py", [*arguments, *SKIPPING, f"--workdir={undisturbed}"], undisturbed / "again"
    )
    assert code == 0 and "Validation" in printed
    assert (undisturbed / "report.json").read_text() == before


def test_eval_reads_the_run(undisturbed):
    code, printed = script.run("eval.py", [f"--workdir={undisturbed}"], undisturbed / "eval")
    assert code == 0, printed
    assert all(
        title in printed
        for title in ("Validation", "ERC of the clean router", "noise bound", "MaxVio")
    )
    report, found = (
        json.loads((undisturbed / name).read_text()) for name in ("report.json", "eval.json")
    )
    assert found.pop("step") == STEPS
    # Roundings: two programs of the same sums in layers, as in test_init_from.py, but without a
    # power step.
    terms = 2 * (5 * 32 + 32) + 32
    found, expected = found["measures"], report["measures"]
    assert found.keys() == expected.keys()
    assert found["validation/mean"] == pytest.approx(expected["validation/mean"], rel=within(terms))
    same = [
        key
        for key in expected
        if key.split("/")[0] in ("erc", "coupling", "weights", "unigram", "bigram")
    ]
    assert len(same) > 16 and all(found[key] == expected[key] for key in same)


def test_a_run_goes_on_with_a_prompt(undisturbed):
    arguments = [undisturbed, "the rou", "--new_tokens=12", "--temperature=1", "--top_k=9"]
    texts = []
    for seed in (1, 1, 2):
        code, printed = script.run(
            "moe_erc.generate", [*arguments, f"--seed={seed}"], undisturbed / "written"
        )
        assert code == 0, printed
        texts.append(printed.split("the rou", 1)[1])
    assert texts[0] == texts[1] != texts[2]
    _, printed = script.run(
        "moe_erc.generate", [*arguments, "--new_tokens=40000"], undisturbed / "written"
    )
    assert "error: prompt: 7 tokens" in printed.splitlines()[-1] and "Traceback" not in printed


def test_a_run_is_diagnosed(undisturbed, tmp_path):
    flags = [undisturbed, f"--output={tmp_path}"]
    code, printed = script.run("moe_erc.diagnose", flags, undisturbed / "eval")
    assert code == 0, printed
    said = " ".join(printed.split())  # wrapped wherever a line was full
    assert all(
        words in said
        for words in ("ERC of the clean router", "without the norms", "layers are coupled")
    )
    report, found = (json.loads(path.read_text())["measures"] for path in (
        undisturbed / "report.json", tmp_path / "diagnosis.json"
    ))  # fmt: skip
    # Roundings: sums over D = 32, F = 16 and 16 pairs, by two programs.
    for key in (f"erc/alpha_{alpha}" for alpha in range(1, 6)):
        assert_close(np.float32(found[key]), np.float32(report[key]), terms=32 + 16 + 16)
    shown = (tmp_path / "diagnosis.md").read_text().splitlines()
    named = {line.split("](")[1].rstrip(")") for line in shown if "](" in line}
    assert (
        named == {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
        and len(named) == 5
    )


def test_eval_draws_a_run(undisturbed, tmp_path):
    flags = [f"--workdir={undisturbed}", "--figures", "--windows=2", f"--output={tmp_path}"]
    code, printed = script.run("eval.py", flags, undisturbed / "eval")
    assert code == 0 and "Validation" in printed, printed
    html = (tmp_path / "report.html").read_text()
    assert (
        html.count("<img") == len(list(tmp_path.rglob("*.png"))) > 8 and f">{undisturbed}<" in html
    )


def test_eval_asks_the_harness(undisturbed, tmp_path):
    pytest.importorskip("lm_eval")
    flags = [
        f"--workdir={undisturbed}",
        "--tasks=alphabet_choice",
        "--task_dir=tests/evaluation/tasks",
        "--limit=2",
    ]
    environment = {"HF_HOME": tmp_path, "HF_HUB_OFFLINE": 1}
    code, printed = script.run("eval.py", flags, undisturbed / "eval", environment=environment)
    assert code == 0 and " alphabet_choice " in printed and "Validation" not in printed, printed
    assert "\r" not in printed and "Answering tasks: 6 requests in " in printed, printed
    found = json.loads((undisturbed / "tasks.json").read_text())
    assert found["step"] == STEPS and found["n-samples"]["alphabet_choice"] == {
        "original": 3,
        "effective": 2,
    }
    assert 0 <= found["results"]["alphabet_choice"]["acc,none"] <= 1


def test_another_models_directory_is_refused(arguments, undisturbed):
    for change, words in (
        ("--config.model.experts=8", ["model.experts = 4", "8", "--workdir"]),
        ("--config.optimizer.name=muon", ["optimizer.name", "adamw", "muon"]),
        ("--config.data.sequence_length=16", ["data.sequence_length = 32", "16", "--workdir"]),
    ):
        everything = [*arguments, *SKIPPING, f"--workdir={undisturbed}", change]
        code, printed = script.run("train.py", everything, undisturbed / "other")
        assert code == 2 and all(word in printed.splitlines()[-1] for word in words), printed
    assert saved_state(undisturbed, STEPS)[0] == STEPS


def test_losses_that_are_not_finite_are_skipped_until_the_run_stops_with_its_last_good_checkpoint(
    arguments, tmp_path
):
    # test_resumed_changes.py has a run that skips no step.
    # With this learning rate a few steps, though not the first, overflow the squares of float32.
    everything = [
        *arguments,
        f"--workdir={tmp_path}",
        "--config.optimizer.learning_rate=1e8",
        "--config.optimizer.warmup_steps=0",
        "--config.guard.nonfinite=skip",
        "--config.guard.limit=3",
        "--config.checkpoint.every=1",
        "--config.eval.every=1000",
    ]
    code, printed = script.run("train.py", everything, tmp_path / "out")
    last = printed.splitlines()[-1]
    assert code == 3 and printed.count("the step was skipped") == 2, printed
    for words in (
        "not finite",
        "step",
        "last good checkpoint",
        "guard.limit: 3 steps skipped in a row",
    ):
        assert words in last, printed
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        kept = checkpoints.latest_step()
    assert kept and last.endswith(f"the last good checkpoint is of step {kept}")
    counted = [line for line in metrics(tmp_path) if not line["guard/skipped_in_a_row"]]
    assert counted and all(value is not None for line in counted for value in line.values())
