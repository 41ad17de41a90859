"""What is missing is run, once each, whatever is killed on the way; the rows end the same.

`train.py` is a stand-in here, which ends at once. `tests/test_study.py` runs the real one.
"""

import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from moe_erc.checks import BadInput
from moe_erc.data import text
from moe_erc.data.config import DataConfig
from moe_erc.study import claims, rows, run
from tests.study.conftest import STAND_IN


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Places of a plan, with the stand-in for train.py that reads the corpus of the plan."""
    monkeypatch.setenv("MOE_ERC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run, "POLL", 0.01)
    monkeypatch.setattr(run, "LOOK", 0.1)

    def make(plan):
        corpus = text.prepare(DataConfig(**plan.settings["vanilla"].config.data)).identity
        script = tmp_path / "stand_in.py"
        script.write_text(STAND_IN.replace("CORPUS", repr(corpus)), encoding="utf-8")
        (tmp_path / "runs").mkdir(exist_ok=True)
        return run.Places(tmp_path / "runs", script)

    return make


def finish(plan, places, jobs=1):
    run.check(plan, places)
    with run.Stop() as stop:
        failed = run.run_missing(plan, places, jobs, stop)
    return failed, rows.read_rows(plan)


def starts(places):
    """How often each run was started."""
    return {path.parent.name: len(path.read_text("utf-8")) for path in places.runs.glob("*/starts")}


def test_every_run_becomes_a_row(make_plan, places, capsys):
    plan = make_plan()
    where = places(plan)
    failed, found = finish(plan, where)
    assert failed == []
    names = [f"{row['arm']}-{row['seed']}" for row in found]
    assert names == ["vanilla-0", "vanilla-1", "erc-1000", "erc-1001"]
    assert found[1]["outcome"] == pytest.approx(2.01)
    assert found[1]["curve"] == [[1, pytest.approx(3.01)], [2, pytest.approx(2.01)]]
    assert found[1]["measures"]["erc/alpha_1"] == [0.0, 0.5]
    assert found[1]["tokens"] == 2 * 8 * 32 and found[1]["seconds"] == pytest.approx(5.12)
    assert found[1]["config"] == plan.settings["vanilla"].values
    printed = capsys.readouterr().out
    assert (
        "small: 0 of 4 runs are done, 1 running, 3 to come" in printed
        and "small: 4 of 4 runs are done" in printed
    )
    assert not list(where.runs.glob("*.claim-*"))
    # A second time there is nothing to do, and the file stays as it is.
    before = plan.rows_path.read_bytes()
    finish(plan, where)
    assert set(starts(where).values()) == {1} and plan.rows_path.read_bytes() == before


def test_more_seeds_add_rows_and_leave_the_others_as_they_are(write_study, make_plan, places):
    plan = make_plan()
    where = places(plan)
    _, before = finish(plan, where)
    _, after = finish(make_plan(seeds="3"), where)
    assert len(after) == 6 and all(row in after for row in before)
    assert set(starts(where).values()) == {1}


def test_the_outcome_is_the_mean_of_the_last_evaluations(make_plan, places):
    plan = make_plan(evaluations="2")
    assert finish(plan, places(plan))[1][0]["outcome"] == pytest.approx(2.5)


def test_runs_side_by_side_have_a_core_each(make_plan, places):
    plan = make_plan()
    failed, found = finish(plan, places(plan), jobs=2)
    assert not failed and len(found) == 4
    with pytest.raises(BadInput, match=r"--jobs: 10000 are more than the"):
        finish(plan, places(plan), jobs=10_000)


def test_a_run_that_fails_leaves_no_row_and_is_said(make_plan, places, capsys):
    plan = make_plan()
    where = places(plan)
    (where.runs / "fail").touch()
    failed, found = finish(plan, where)
    assert sorted(failed) == ["erc-1000", "erc-1001", "vanilla-0", "vanilla-1"] and found == []
    assert "vanilla-0 has no row (exit code 1): the disk is full" in capsys.readouterr().out
    (where.runs / "fail").unlink()
    assert len(finish(plan, where)[1]) == 4


def test_two_that_share_a_directory_make_every_run_once(make_plan, places):
    plan = make_plan(seeds="8")
    where = places(plan)
    run.check(plan, where)
    none = run.Stop()
    workers = [
        threading.Thread(target=run.run_missing, args=(plan, where, 2, none)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(rows.collect(plan, where.runs)) == 16
    assert set(starts(where).values()) == {1}


def start_worker(plan, where):
    """A process that works on the study, as study.py does."""
    code = (
        "import pathlib\nfrom moe_erc.study import arms, run\nrun.POLL = 0.01\n"
        f"plan = arms.open_plan({str(plan.path)!r})\n"
        f"runs = pathlib.Path({str(where.runs)!r})\n"
        f"places = run.Places(runs, pathlib.Path({str(where.script)!r}))\n"
        "with run.Stop() as stop:\n    run.run_missing(plan, places, 1, stop)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[2])


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_started_again_it_ends_with_the_same_rows(make_plan, places, number):
    plan = make_plan()
    where = places(plan)
    (where.runs / "wait").touch()
    worker = start_worker(plan, where)
    wait_for(lambda: (where.runs / "vanilla-0" / "starts").exists())
    worker.send_signal(number)
    worker.wait(60)
    if number == signal.SIGTERM:
        assert not list(where.runs.glob("*.claim-*"))
    else:
        assert claims.state(where.runs / "vanilla-0") == "orphaned"
    (where.runs / "wait").unlink()
    _, found = finish(plan, where)
    assert [row["outcome"] for row in found] == pytest.approx([2.0, 2.01, 2.06, 2.0])
    # Killed, its training went on; asked to stop, it was stopped and begun again.
    assert starts(where) == {"vanilla-0": 2, "vanilla-1": 1, "erc-1000": 1, "erc-1001": 1}


def test_a_directory_of_another_config_is_refused(make_plan, places):
    plan = make_plan()
    where = places(plan)
    (where.runs / "fail").touch()
    finish(plan, where)
    with pytest.raises(BadInput, match="vanilla-0' is of another config of 'vanilla'"):
        run.check(make_plan(overrides="{**SHORT, 'train.batch_size': 4}"), where)


def test_rows_of_another_corpus_are_refused_before_anything_is_run(make_plan, places):
    plan = make_plan()
    where = places(plan)
    other = where.script.read_text("utf-8").replace('"corpus": ', '"corpus": "other" + ')
    where.script.write_text(other, encoding="utf-8")
    finish(plan, where)
    with pytest.raises(
        BadInput,
        match=r"the row vanilla-0 was made with the corpus other\w+, and data.sources give",
    ):
        run.check(make_plan(seeds="3"), where)


def test_the_commit_of_a_row():
    root = pathlib.Path(__file__).parents[2]
    assert (
        run.commit_of(root) == "unknown" or len(run.commit_of(root).removesuffix("+changes")) == 10
    )
    assert run.commit_of(pathlib.Path("/")) == "unknown"


@pytest.mark.parametrize("changes, words", [
    ({"outcome": "'validation/prose'"},
     r"the domain: 'prose' is not one of mean, regime_0, regime_1"),
    ({"outcome": "'floor_distance/mean'", "overrides": "{**SHORT, 'data.sources': ('TEXT',)}"},
     "is not known"),
])  # fmt: skip
def test_an_outcome_that_the_corpus_does_not_have_is_refused(
    make_plan, places, text_directory, changes, words
):
    changes = {key: value.replace("TEXT", str(text_directory)) for key, value in changes.items()}
    plan = make_plan(**changes)
    with pytest.raises(BadInput, match=words):
        run.check(plan, places(plan))
