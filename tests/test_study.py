"""study.py as a user runs it, with the real train.py in two-step runs."""

import os
import pathlib
import signal
import time

from moe_erc.study import arms, claims, rows
from tests import script
from tests.study.conftest import write_study  # noqa: F401  a fixture


def test_a_study_that_is_killed_ends_with_all_rows_and_none_is_made_twice(write_study, tmp_path):  # noqa: F811
    path = write_study()
    arguments = [f"--study={path}", f"--runs={tmp_path / 'runs'}", "--jobs=2"]
    # One cache for the text, whatever other tests read.
    environment = {"MOE_ERC_CACHE": tmp_path / "cache"}
    first = script.start("study.py", arguments, tmp_path / "out0", environment)
    plan = arms.open_plan(path)
    deadline = time.monotonic() + 240
    while not plan.rows_path.exists():
        assert first.is_alive() and time.monotonic() < deadline, (tmp_path / "out0").read_text()
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    before = plan.rows_path.read_text("utf-8").splitlines()
    code, printed = script.run("study.py", arguments, tmp_path / "out1", environment=environment)
    assert code == 0, printed
    found = rows.read_rows(plan)
    assert [row["arm"] for row in found] == ["vanilla", "vanilla", "erc", "erc"]
    assert set(before) <= set(plan.rows_path.read_text("utf-8").splitlines())
    assert "erc: n = 2 of 2, mean" in printed and "; difference " in printed
    for row in found:
        assert row["environment"]["devices"] == 1 and row["corpus"] == found[0]["corpus"]
        assert {"validation/mean", "floor_distance/mean", "router/purity"} <= set(row["measures"])
    assert not list((tmp_path / "runs").rglob("*.claim-*"))
    # Started once more, it runs nothing.
    outputs = {
        path: path.stat().st_mtime for path in pathlib.Path(tmp_path / "runs").rglob("output.txt")
    }
    code, printed = script.run("study.py", arguments, tmp_path / "out2", environment=environment)
    assert code == 0 and "starts" not in printed
    assert outputs == {path: path.stat().st_mtime for path in outputs}
    assert claims.state(tmp_path / "runs" / "small" / "vanilla-0") == "free"


def test_bad_input_is_one_line_and_nothing_is_run(write_study, tmp_path):  # noqa: F811
    path = write_study(outcome="'router/max_lod'")
    arguments = [f"--study={path}", f"--runs={tmp_path / 'runs'}"]
    code, printed = script.run("study.py", arguments, tmp_path / "out")
    assert code == 2 and printed.startswith("error: study.outcome: 'router/max_lod'")
    assert len(printed.strip().splitlines()) == 1 and not (tmp_path / "runs").exists()
    code, printed = script.run("study.py", [], tmp_path / "out")
    assert code == 2 and "--study: name the file of a study" in printed
