"""Processes of one run find each other, or each says in one line why not."""

import socket
import textwrap

import pytest

from moe_erc.launch import processes
from tests import script

LIMIT = 120  # seconds until what hangs is given up


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(environment, tmp_path, number):
    return script.start(
        "train.py", [f"--workdir={tmp_path}"], tmp_path / f"out{number}", environment
    )


def errors(path):
    """The lines that end a process; what process 0 prints of the model stands before them."""
    printed = path.read_text()
    assert "Traceback" not in printed and "stack trace" not in printed, printed
    return [line for line in printed.splitlines() if line.startswith("error")]


def test_an_unreachable_coordinator_is_one_line(tmp_path):
    environment = {
        "JAX_COORDINATOR_ADDRESS": free_address(),
        "JAX_NUM_PROCESSES": 2,
        "JAX_PROCESS_ID": 1,
    }
    member = start(environment | {"MOE_ERC_COORDINATOR_TIMEOUT": 1}, tmp_path, 1)
    assert script.join([member], LIMIT) == [2]
    (line,) = errors(tmp_path / "out1")
    assert (
        line.startswith("error: ")
        and environment["JAX_COORDINATOR_ADDRESS"] in line
        and "in time" in line
    )


@pytest.mark.parametrize("counts, limit, words", [
    ((2, 3), 60, ["processes 0 and 1 differ in JAX_NUM_PROCESSES"]),
    ((3, 3), 5, ["of JAX_NUM_PROCESSES = 3", "in time, 5 s", "MOE_ERC_COORDINATOR_TIMEOUT"]),
])  # fmt: skip
def test_a_process_count_that_does_not_match_is_one_line_each(tmp_path, counts, limit, words):
    address, members = free_address(), []
    for number, count in enumerate(counts):
        environment = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": count,
            "JAX_PROCESS_ID": number,
        }
        environment["MOE_ERC_COORDINATOR_TIMEOUT"] = limit
        members.append(start(environment, tmp_path, number))
    assert script.join(members, LIMIT) == [2, 2]
    for number in range(2):
        (line,) = errors(tmp_path / f"out{number}")
        assert line.startswith("error: ") and all(word in line for word in words)


@pytest.mark.parametrize("environment, words", [
    ({"JAX_NUM_PROCESSES": ""}, ["JAX_NUM_PROCESSES is not set", "JAX_PROCESS_ID"]),
    ({"JAX_NUM_PROCESSES": "two"}, ["JAX_NUM_PROCESSES: 'two'"]),
    ({"JAX_PROCESS_ID": "2"}, ["JAX_PROCESS_ID: 2", "JAX_NUM_PROCESSES = 2"]),
    ({"JAX_COORDINATOR_ADDRESS": "host"}, ["JAX_COORDINATOR_ADDRESS: 'host'", "HOST:PORT"]),
    ({"MOE_ERC_COORDINATOR_TIMEOUT": "0"}, ["MOE_ERC_COORDINATOR_TIMEOUT: '0'"]),
])  # fmt: skip
def test_settings_that_make_no_sense_are_named(monkeypatch, environment, words):
    whole = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    for name, value in (whole | environment).items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError) as refusal:
        processes.initialize()
    assert all(word in str(refusal.value) for word in words)


SLURM = {"SLURM_JOB_ID": 4711, "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_LOCALID": 0}
COUNTED = """
    import jax
    from moe_erc.launch import processes
    processes.initialize()
    print("one of", jax.process_count(), jax.distributed.is_initialized())
"""


@pytest.mark.parametrize("tasks, said", [(2, "one of 2 True"), (1, "one of 1 False")])
def test_the_tasks_of_a_slurm_step_find_each_other_and_a_single_one_is_alone(tasks, said, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(COUNTED))
    members = [
        script.start(
            program,
            [],
            tmp_path / f"out{task}",
            SLURM | {"SLURM_NTASKS": tasks, "SLURM_PROCID": task},
        )
        for task in range(tasks)
    ]
    assert script.join(members, LIMIT) == [0] * tasks
    assert all(said in (tmp_path / f"out{task}").read_text() for task in range(tasks))
