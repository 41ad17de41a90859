"""The stages that measure an accelerator run anywhere, at a size whose times say nothing."""

import json
import subprocess
import sys

import pytest

from tests.script import ROOT


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", ["kernels", "matmuls", "layer", "step", "profile"])
def test_a_stage_prints_and_keeps_its_rows(tmp_path, stage):
    command = [
        sys.executable,
        "-m",
        "benchmarks.on_device",
        stage,
        "--size=debug",
        f"--output={tmp_path}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / f"{stage}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[0]["devices"] == ["cpu"]
    assert len(rows) > 1
    failed = [
        row for row in rows if "failed" in row and row.get("implementation") != "attend_by_cudnn"
    ]
    assert not failed
