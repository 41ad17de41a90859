"""Two and four processes train the curve of one, stop together, and hand over to other numbers."""

import itertools
import os
import shutil
import signal
import textwrap
import time

import jax
import numpy as np
import pytest

from tests import script
from tests.tolerance import within
from tests.training.test_damage import flip
from tests.written import metrics, saved_state

STEPS, FEW = 80, 5
EVALUATED = 4 * FEW  # steps between evaluations, which each process of a run would compile
# Seconds until a process that hangs is given up. Others are quick unless the machine is busy.
LIMIT = 600
# jax looks for a SIGTERM once per second. With its pauses this program runs for longer.
SLOWLY = "tests/train_slowly.py"


@pytest.fixture(scope="module")
def train(text_directory, tmp_path_factory):
    """Starts `count` processes of a run, of train.py or of another program, and returns them."""
    cache = tmp_path_factory.mktemp("cache")

    def start(count, workdir, *arguments, program="train.py", **environment):
        everything = [
            "--config=configs/erc.py:debug",
            f"--config.data.sources=('{text_directory}',)",
            f"--config.data.cache_dir={cache}",
            "--config.data.validation_fraction=0.1",
            f"--config.train.steps={STEPS}",
            # A tenth of the size's rate: runs with sums in another order diverge slowly.
            "--config.optimizer.learning_rate=3e-4",
            "--config.train.batch_size=32",
            "--config.checkpoint.every=1000",
            f"--config.eval.every={EVALUATED}",
            "--config.eval.prompt=",
            "--config.log.every=1",
            "--config.log.tensorboard=False",
            f"--workdir={workdir}",
            *arguments,
        ]
        return script.start_many(count, program, everything, workdir, **environment)

    return start


def printed(workdir):
    return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(workdir.glob("out*")))


def assert_same_curve(found, expected):
    """Every metric of every step is the same but for the rounding of 80 steps: `within_drift`."""
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert within_drift(name, mine[name], value), (theirs["step"], name, mine[name], value)
    losses = [line["loss/lm"] for line in expected if "loss/lm" in line]
    apart = [not within_drift("loss/lm", one, other) for one, other in itertools.pairwise(losses)]
    # So a step too many or too few, or another batch, would show.
    assert np.mean(apart) > 0.9


def within_drift(name, found, expected):
    """Whether a metric differs only by sums in another order, which the optimizer amplifies.

    Several instruction sets gave a difference of 8e-7 of a loss, and of 1e-7 in cosines, which are
    differences of numbers of about 1. Ten times as much is allowed. Rounding may also decide
    between two experts whose scores are almost equal, and so move a token. In a load of 1,024
    tokens with two experts each, one such token is E / 2,048 = 4 / 2,048 of a mean share. Two such
    tokens are allowed.
    """
    moved = 2 * 4 / 2048 if name.startswith("router/") else 0
    return bool(
        np.all(np.abs(np.subtract(found, expected)) <= 1e-5 * np.abs(expected) + 1e-6 + moved)
    )


@pytest.fixture(scope="module")
def alone(train, tmp_path_factory):
    """The metrics and the workdir of one undisturbed process with two devices."""
    workdir = tmp_path_factory.mktemp("alone")
    assert script.join(train(1, workdir, JAX_NUM_CPU_DEVICES=2), LIMIT) == [0], printed(workdir)
    assert len(metrics(workdir)) == STEPS + STEPS // EVALUATED  # every step, and the validations
    return workdir


def terminate_one(members, workdir, name, count):
    """Sends SIGTERM to the last process once a file of the run has so many lines.

    All must leave in order.
    """
    path, deadline = workdir / name, time.monotonic() + LIMIT
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline and all(process.is_alive() for process in members), (
            printed(workdir)
        )
        time.sleep(0.001)
    os.kill(members[-1].pid, signal.SIGTERM)
    assert script.join(members, LIMIT) == [143] * len(members), printed(workdir)


@pytest.fixture(scope="module")
def stopped(train, tmp_path_factory):
    """The workdir of four processes that save every few steps; the last one was sent SIGTERM."""
    workdir = tmp_path_factory.mktemp("stopped")
    mesh = "--config.mesh.data=2", "--config.mesh.expert=2"
    members = train(4, workdir, *mesh, f"--config.checkpoint.every={FEW}", program=SLOWLY)
    terminate_one(members, workdir, "metrics.jsonl", FEW + 2)
    return workdir


def test_four_processes_train_the_curve_of_one(alone, stopped):
    found = metrics(stopped)
    assert_same_curve(found, metrics(alone)[: len(found)])
    said = [(stopped / f"out{number}").read_text() for number in range(4)]
    assert ["mesh" in words or "step/s" in words for words in said] == [True, False, False, False]


def test_four_processes_stop_together_and_one_goes_on(train, alone, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    step, state = saved_state(tmp_path, STEPS)
    assert FEW < step < STEPS - 1 and metrics(tmp_path)[-1]["step"] == step
    jax.tree.map(np.testing.assert_array_equal, state, saved_state(tmp_path, STEPS, (2, 4))[1])
    norm = float(
        np.sqrt(
            sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(state.params))
        )
    )
    # The last line may be that of a validation.
    steps = [line for line in metrics(tmp_path) if "norm/parameters" in line]
    # The largest matrix has 512 * 32 squares. Random roundings add up to the root of their number,
    # 128.
    assert steps[-1]["norm/parameters"] == pytest.approx(norm, rel=within(128))

    # One process goes on to the end with another mesh, that of the undisturbed run, whose programs
    # are compiled.
    members = train(1, tmp_path, JAX_NUM_CPU_DEVICES=2)
    assert script.join(members, LIMIT) == [0], printed(tmp_path)
    assert_same_curve(metrics(tmp_path), metrics(alone))
    _, final = saved_state(tmp_path, STEPS)
    _, expected = saved_state(alone, STEPS)
    # Adam moves a parameter by up to the rate, 3e-4, in each step, even where its gradient is only
    # rounding. A single parameter may differ by one of the 80 steps, and the root mean square of
    # all by a tenth of a step.
    for one, other in zip(
        jax.tree.leaves(final.params), jax.tree.leaves(expected.params), strict=True
    ):
        assert np.abs(one - other).max() < 3e-4 and np.sqrt(np.mean(np.square(one - other))) < 3e-5


def test_two_processes_go_on_before_a_damaged_checkpoint_and_stop_together(
    train, alone, stopped, tmp_path
):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    damaged, intact, *_ = sorted(
        (int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*")), reverse=True
    )
    flip(tmp_path / "checkpoints" / str(damaged))
    lines = len(metrics(tmp_path))

    flags = ["--config.mesh.expert=2", f"--config.checkpoint.every={FEW}"]
    members = train(2, tmp_path, *flags, program=SLOWLY)
    past_an_evaluation = EVALUATED + 2
    terminate_one(members, tmp_path, "metrics.jsonl", max(lines + 2 * FEW, past_an_evaluation))
    said = (tmp_path / "out0").read_text()
    assert (
        f"checkpoint {damaged} is damaged (" in said
        and f"step {intact} is used, it is kept as damaged-" in said
    )
    assert (tmp_path / "checkpoints" / f"damaged-{damaged}").is_dir()
    found = metrics(tmp_path)
    assert any("validation/mean" in line for line in found)
    assert_same_curve(found, metrics(alone)[: len(found)])


# jax looks for a SIGTERM once per second. This one comes before the first step of a run that is
# resumed at step 100.
INTERRUPTED_BEFORE_THE_FIRST_STEP = """
    import os, signal, time
    import jax
    from moe_erc.launch import processes
    from moe_erc.training.interrupt import StopRequest
    processes.initialize()
    with StopRequest() as stop:
        if jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2.5)
        print("left after", next(step for step in range(101, 200) if stop.reached(step)))
        assert stop.signal == signal.SIGTERM
"""


def test_ctrl_c_before_the_first_step_of_a_resumed_run_is_not_lost(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(INTERRUPTED_BEFORE_THE_FIRST_STEP))
    assert script.join(script.start_many(2, program, [], tmp_path), LIMIT) == [0, 0], printed(
        tmp_path
    )
    assert all("left after 101\n" in (tmp_path / f"out{number}").read_text() for number in range(2))


# Two processes of two devices each. The mesh takes devices from the processes in turn.
PLACES_AND_AGREEMENT = """
    import sys
    import jax, numpy as np
    from moe_erc import sharding
    from moe_erc.launch import command_line, processes
    from moe_erc.checks import BadInput
    case = sys.argv[1]
    with command_line.refusing_bad_input(), processes.ending_together():
        processes.initialize()
        process = jax.process_index()
        devices = jax.devices()
        assert [device.process_index for device in devices] == [0, 0, 1, 1]
        mesh = sharding.make_mesh(2, 2, [devices[number] for number in (2, 0, 3, 1)])
        in_turn = jax.sharding.Mesh(np.array(devices)[[2, 0, 3, 1]].reshape(2, 2), mesh.axis_names)
        rows = sharding.local_rows(in_turn, 8)
        assert rows == ([2, 3, 6, 7], [0, 1, 4, 5])[process], rows
        total = jax.jit(lambda x: x, out_shardings=sharding.replicate(in_turn))
        for placed in (sharding.put_batch(in_turn, {"row": np.array(rows)}),
                       sharding.put_whole_batch(in_turn, {"row": np.arange(8)})):
            assert jax.device_get(total(placed["row"])).tolist() == list(range(8))
        processes.agree({"config": {"a": (1, 2)}})
        if case == "differ":
            processes.agree({"config": 1, "data": process})
        if case == "refuse":
            with processes.first():
                if process == int(sys.argv[2]):
                    raise BadInput("no such corpus")
        if case == "fail":
            with processes.first():
                if process == int(sys.argv[2]):
                    raise ValueError("a fault of the program")
"""


@pytest.mark.parametrize("case, lines", [
    (["agree"], ["", ""]),
    (["differ"], ["error: processes 0 and 1 differ in data: "] * 2),
    (["refuse", 0], ["error: no such corpus", "error: process 0: no such corpus"]),
    (["refuse", 1], ["error: process 1: no such corpus", "error: no such corpus"]),
])  # fmt: skip
def test_rows_lie_where_they_belong_and_errors_are_shared(case, lines, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PLACES_AND_AGREEMENT))
    codes = script.join(script.start_many(2, program, case, tmp_path, JAX_NUM_CPU_DEVICES=2), LIMIT)
    assert codes == [0 if not line else 2 for line in lines], printed(tmp_path)
    for number, line in enumerate(lines):
        errors = [
            said
            for said in (tmp_path / f"out{number}").read_text().splitlines()
            if said.startswith("error")
        ]
        assert [said.startswith(line) for said in errors] == ([True] if line else [])


@pytest.mark.parametrize("failing", [0, 1])
def test_a_fault_of_one_process_is_bad_input_on_none(failing, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PLACES_AND_AGREEMENT))
    arguments = ["fail", failing]
    codes = script.join(
        script.start_many(2, program, arguments, tmp_path, JAX_NUM_CPU_DEVICES=2), LIMIT
    )
    assert codes == [1, 1], printed(tmp_path)
    said = [(tmp_path / f"out{number}").read_text() for number in range(2)]
    assert all("Traceback" in text and "\nerror: " not in text for text in said)
    assert f"process {failing}: a fault of the program" in said[1 - failing]
