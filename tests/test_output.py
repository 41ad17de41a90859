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


def steps_of_metrics(directory):
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted({json.loads(line)["step"] for line in lines})


@pytest.mark.parametrize("prepare", [NO_READER, CLOSED, FULL], ids=["no reader", "closed", "full"])
def test_a_console_that_takes_nothing_ends_no_run_and_changes_no_file(prepare, train, tmp_path):
    # The sample, which is printed where the tables are, is the next test's.
    code, printed = train(prepare, "--config.eval.prompt=")
    assert code == 0 and "Traceback" not in printed, printed
    assert steps_saved(tmp_path / "run") == [3, 6]
    assert (tmp_path / "run" / "report.json").exists()
    assert steps_of_metrics(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


def test_a_console_in_ascii_ends_no_run_and_a_log_has_a_line_every_so_many_steps(train, tmp_path):
    code, printed = train(ASCII, "--config.log.every=2", "--config.eval.every=6")
    assert code == 0 and "Traceback" not in printed, printed
    assert steps_saved(tmp_path / "run") == [3, 6]
    assert (tmp_path / "run" / "report.json").exists()
    assert "\r" not in printed and "\x1b" not in printed, printed
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
