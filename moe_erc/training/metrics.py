"""Metrics, named `group/name`, to a JSON-lines file and, if asked, to TensorBoard and Weights & Biases.

On several processes, process 0 writes. A resumed run goes on where its checkpoint was, in every one of the three.
"""

import importlib.util
import re

import jax
import numpy as np

from moe_erc.checks import BadInput
from moe_erc.training.json_lines import LocalJsonLines, RemoteJsonLines
from moe_erc.training.paths import absolute, is_remote


def check_package(wandb_project: str):
    """ValueError where Weights & Biases is asked for and not installed."""
    if wandb_project and importlib.util.find_spec("wandb") is None:
        raise BadInput(
            f'log.wandb_project: {wandb_project!r} needs wandb: pip install "moe_erc[wandb]", or leave it empty'
        )


class MetricWriter:
    """Writes to every sink asked for. On a pod process 0 writes, the others' writes do nothing."""

    def __init__(self, directory, tensorboard: bool, wandb_project: str, config: dict, first_step: int = 0):
        """first_step: the first step this run will write; a resumed run passes the restored step + 1.

        An empty wandb_project means no Weights & Biases. `config` (plain JSON) is shown there beside the curves.
        """
        self._sinks = []
        if jax.process_index() != 0:
            return
        directory = absolute(directory)
        directory.mkdir(parents=True, exist_ok=True)
        json_lines = RemoteJsonLines if is_remote(directory) else LocalJsonLines
        self._sinks.append(json_lines(directory / "metrics.jsonl", first_step))
        if tensorboard:
            self._sinks.append(_TensorBoard(directory / "tensorboard", first_step))
        if wandb_project:
            self._sinks.append(_WeightsAndBiases(wandb_project, directory, config))

    def write(self, step, metrics):
        """Writes {name: number or (nested) list of numbers}; arrays are fetched from the device here."""
        values = {name: np.asarray(value, np.float64).tolist() for name, value in metrics.items()}
        for sink in self._sinks:
            sink.write(int(step), values)

    def flush(self):
        """Before a checkpoint: what a run resumed from it will not write again is then safe, in a bucket too."""
        for sink in self._sinks:
            sink.flush()

    def close(self):
        """Flushes and closes every sink."""
        for sink in self._sinks:
            sink.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _TensorBoard:
    def __init__(self, directory, first_step):
        from tensorboardX import SummaryWriter  # half a second of import that a run without it should not pay

        self._writer = SummaryWriter(str(directory), purge_step=first_step)

    def write(self, step, values):
        for name, value in _scalars(values):
            self._writer.add_scalar(name, value, step)

    def flush(self):
        self._writer.flush()

    def close(self):
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, project, directory, config):
        import wandb

        # The id lies beside the checkpoints, so that a resumed run continues its own curves.
        identity = directory / "wandb_id"
        if not identity.exists():
            identity.write_text(wandb.util.generate_id(), encoding="utf-8")
        self._run = wandb.init(
            project=project,
            dir=None if is_remote(directory) else str(directory),
            config=config,
            id=identity.read_text(encoding="utf-8"),
            resume="allow",
        )

    def write(self, step, values):
        self._run.log(dict(_scalars(values)), step=step)

    def flush(self):
        pass  # its own process sends what was logged

    def close(self):
        self._run.finish()


def _scalars(values):
    """("router/load", [[a, b]]) becomes ("router/load/0/0", a), ("router/load/0/1", b): a curve for every number."""
    for name, value in values.items():
        for index, number in np.ndenumerate(np.asarray(value)):
            yield "/".join([name, *map(str, index)]), float(number)


# Dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets; the first pattern found in the kind counts.
# A device is a chip, except for TPU v2, v3 and 7x, where it is one of the chip's two cores.
PEAK_FLOPS = (
    (r"TPU v2", 45e12 / 2),
    (r"TPU v3", 123e12 / 2),
    (r"TPU v4 lite", 137e12),
    (r"TPU v4", 275e12),
    (r"TPU v5 ?(lite|e)", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6 ?(lite|e)", 918e12),
    (r"TPU ?7x", 2307e12 / 2),
    (r"A100", 312e12),
    (r"H100 PCIe", 756e12),
    (r"H100|H200|GH200", 989e12),
    (r"B200", 2250e12),
    (r"GB200", 2500e12),
    (r"L40S", 362e12),
    (r"L4", 121e12),
    (r"RTX 4090", 165e12),
)


def peak_flops(device_kind) -> float | None:
    """The most a device of this `jax.Device.device_kind` can do, for the MFU; None where not known, as on a CPU."""
    if "MIG" in device_kind:  # a slice of a GPU carries the name of the whole
        return None
    return next((peak for pattern, peak in PEAK_FLOPS if re.search(rf"\b({pattern})\b", device_kind)), None)
