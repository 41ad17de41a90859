"""Whole runs whose output goes to an odd place: nothing printed ends them, and a log has lines."""

import json
import re
import textwrap

import pytest

from tests import script

# What is done to a process before it becomes train.py.
ASCII = 'sys.stdout.reconfigure(encoding="ascii", errors="strict")'
NO_READER = "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)"
CLOSED = "os.close(1); sys.stdout = None"
FULL = 'os.dup2(os.open("/dev/full", os.O_WRONLY), 1)'
PROGRAM = """
import os, runpy, sys
{prepare}
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.fixture
def train(text_directory, tmp_path):
    """Runs train.py after `prepare`; (exit code, what it printed)."""

    def run(prepare, *arguments):
        program = tmp_path / "program.py"
        program.write_text(PROGRAM.format(prepare=textwrap.dedent(prepare)), encoding="utf-8")
        given = {
            "--config": "configs/erc.py:debug",
            "--config.data.sources": f"('{text_directory}',)",
            "--config.data.validation_fraction": "0.1",
            "--config.data.cache_dir": tmp_path / "cache",
            "--workdir": tmp_path / "run",
        }
        arguments = [*(f"{name}={value}" for name, value in given.items()), *arguments]
        return script.run(program, arguments, tmp_path / "out")

    return run


def steps_saved(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdecimal())


@pytest.mark.parametrize("prepare", [ASCII, NO_READER, CLOSED, FULL], ids=["ascii", "no reader", "closed", "full"])
def test_a_console_ends_no_run(prepare, train, tmp_path):
    code, printed = train(prepare)
    assert code == 0 and "Traceback" not in printed, printed
    assert steps_saved(tmp_path / "run") == [3, 6] and (tmp_path / "run" / "report.json").exists()


def test_a_log_has_a_line_every_so_many_steps(train):
    code, printed = train("", "--config.log.every=2", "--config.eval.every=6")
    assert code == 0 and "\r" not in printed and "\x1b" not in printed, printed
    lines = [line for line in printed.splitlines() if re.match(r"step \d+/6: total ", line)]
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [2, 4, 6]
    assert all(" lm " in line and " tokens_per_s " in line and line.endswith(" left") for line in lines)
    assert re.search(r"^Tokenising \w+: \d+ documents in ", printed, re.MULTILINE)
    # a line on standard error stands where it was printed, between those on standard output
    assert printed.index("step 6/6") < printed.index("step 6: validation") < printed.index("Router rows and gates")


BEFORE_TRAINING = """
from moe_erc.training import state
def fail(*_):
    raise {error}
state.init_weights = fail
"""
IN_THE_STEP = """
import jax
from moe_erc.training import step
def fail(*_):
    jax.numpy.ones(3) + jax.numpy.ones(4)
step.batch_gradients = fail
"""


@pytest.mark.parametrize("error", ["ValueError('shapes')", "TypeError('shapes')", "OSError('shapes')", "KeyError('x')"])
def test_an_error_of_the_program_is_no_bad_input(error, train):
    code, printed = train(BEFORE_TRAINING.format(error=error))
    assert code == 1 and "Traceback" in printed and "\nerror: " not in printed, printed


def test_an_error_inside_a_compiled_step_is_no_bad_input(train):
    code, printed = train(IN_THE_STEP)
    assert code == 1 and "Traceback" in printed and "\nerror: " not in printed, printed
    assert "(3,)" in printed and "(4,)" in printed


def test_metrics_do_not_depend_on_where_output_goes(train, tmp_path):
    train(NO_READER)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [step for step in range(1, 7) if any(json.loads(line)["step"] == step for line in lines)] == [*range(1, 7)]
