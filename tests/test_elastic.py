"""A run that changes its machine three times has the losses of one that never does.

launch/test_processes.py is a shorter test of this.
"""

import json

import pytest

from tests import script
from tests.launch.test_processes import within_drift

LIMIT = 600  # seconds until what hangs is given up
STEPS = 12


@pytest.fixture(scope="module")
def train(text_directory, tmp_path_factory):
    """Trains a workdir up to a step, on processes of some devices each, and on a mesh."""
    cache, said = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("said")

    def run(workdir, steps, processes=1, devices=1, mesh=(1, 1)):
        arguments = [
            "--config=configs/erc.py:debug",
            f"--config.data.sources=('{text_directory}',)",
            f"--config.data.cache_dir={cache}",
            "--config.data.validation_fraction=0.1",
            f"--config.train.steps={steps}",
            "--config.optimizer.schedule=constant",  # its rate does not depend on the last step
            # A tenth of the size's rate: runs with sums in another order diverge slowly.
            "--config.optimizer.learning_rate=3e-4",
            f"--config.mesh.data={mesh[0]}",
            f"--config.mesh.expert={mesh[1]}",
            "--config.eval.every=1000",
            "--config.eval.prompt=",
            "--config.log.every=1",
            "--config.log.tensorboard=False",
            f"--workdir={workdir}",
        ]
        quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": True, "JAX_NUM_CPU_DEVICES": devices}
        codes = script.join(
            script.start_many(processes, "train.py", arguments, said, **quick), LIMIT
        )
        assert codes == [0] * processes, "\n".join(path.read_text() for path in said.iterdir())

    return run


def curve(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss/lm" in line}


@pytest.mark.exhaustive
def test_from_one_device_to_two_processes_to_eight_devices_and_back(train, tmp_path):
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    train(straight, STEPS)
    train(moved, 3)
    train(moved, 6, processes=2, devices=2, mesh=(2, 2))
    train(moved, 9, devices=8, mesh=(4, 2))
    train(moved, STEPS)
    expected, found = curve(straight), curve(moved)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    for step, line in expected.items():
        for name, value in line.items():
            if not name.startswith("speed/"):
                assert within_drift(name, found[step][name], value), (
                    step,
                    name,
                    found[step][name],
                    value,
                )
