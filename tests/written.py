"""What a run has written into its work directory, read back to be compared."""

import json
import pathlib

import jax

from configs import erc
from moe_erc.training.build import build
from moe_erc.training.checkpoint import Checkpoints


def metrics(workdir: pathlib.Path) -> list[dict]:
    """Every line of the metrics file without what the clock says."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.startswith("speed/")}
        for line in lines
    ]


def saved_state(workdir: pathlib.Path, steps: int, mesh_shape=(1, 1)):
    """(step, state) of the newest checkpoint of a run of configs/erc.py:debug over so many steps.

    The state is read onto a mesh of this process and fetched, its key as numbers.
    """
    config = erc.get_config("debug")
    config.train.steps = steps
    config.mesh.data, config.mesh.expert = mesh_shape
    shapes = build(config).abstract_state
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(shapes)
        step = checkpoints.latest_step()
    return step, jax.device_get(state.replace(rng=jax.random.key_data(state.rng)))
