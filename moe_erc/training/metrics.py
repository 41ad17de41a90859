"""Metrics, named `group/name`, to a JSON-lines file and, if asked, to TensorBoard and Weights & Biases.

No writer ends a run before its checkpoint: that the file cannot be written is an error kept for `check`; the two others
are copies for the eye, and one that fails is switched off with one line.

On several processes, process 0 writes. A resumed run goes on where its checkpoint was, in every one of the three.
"""

import importlib.util
import re
import secrets
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_erc.checks import BadInput
from moe_erc.data.paths import absolute, is_remote
from moe_erc.training.json_lines import LocalJsonLines, RemoteJsonLines


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
        self._file, self._copies, self._error = None, [], None
        if jax.process_index() != 0:
            return
        directory = absolute(directory)
        directory.mkdir(parents=True, exist_ok=True)
        json_lines = RemoteJsonLines if is_remote(directory) else LocalJsonLines
        self._file = json_lines(directory / "metrics.jsonl", first_step)
        if tensorboard:
            self._copies.append(_Copy("TensorBoard", lambda: _TensorBoard(directory / "tensorboard", first_step)))
        if wandb_project:
            connect = lambda: _WeightsAndBiases(wandb_project, directory, config)  # noqa: E731
            self._copies.append(_Copy("Weights & Biases", connect))

    def write(self, step, metrics):
        """Writes {name: number or (nested) list of numbers}; arrays are fetched from the device here."""
        values = {name: np.asarray(value, np.float64).tolist() for name, value in metrics.items()}
        self._ask_all("write", int(step), values)

    def flush(self):
        """Before a checkpoint: what a run resumed from it will not write again is then safe, in a bucket too."""
        self._ask_all("flush")

    def close(self):
        """Flushes and closes every sink; raises as `check` does."""
        self._ask_all("close")
        self.check()

    def check(self):
        """Raises what kept metrics.jsonl from being written: to be asked once the step's checkpoint is being saved."""
        if self._error:
            raise self._error

    def holds(self, step, name) -> bool:
        """Whether metrics.jsonl has that metric of that step; the same on every process."""
        found = self._file is not None and self._file.holds(step, name)
        return bool(multihost_utils.broadcast_one_to_all(np.bool_(found)))

    def _ask_all(self, what, *arguments):
        if self._file is not None and self._error is None:
            try:
                getattr(self._file, what)(*arguments)
            except Exception as error:  # raised by `check`; of a bucket it need not be an OSError
                self._error = error
        for copy in self._copies:
            copy.ask(what, *arguments)

    def __enter__(self):
        return self

    def __exit__(self, _kind, error, _trace):
        self._ask_all("close")
        if error is None:  # else that one ends the run, and is not to be hidden
            self.check()


class _Copy:
    """A sink beside metrics.jsonl, made by `make`: that it fails is said once, and nothing more is asked of it."""

    def __init__(self, name, make):
        self._name, self._sink = name, None
        self._try(lambda: setattr(self, "_sink", make()))

    def ask(self, what, *arguments):
        """Calls that method of the sink."""
        if self._sink is not None:
            self._try(lambda: getattr(self._sink, what)(*arguments))

    def _try(self, action):
        try:
            action()
        except Exception as error:  # of a library, its process, a disk or the network
            self._sink = None
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"{self._name} is switched off ({reason}); metrics.jsonl goes on", file=sys.stderr)


class _TensorBoard:
    """Events are written at once: the library's own thread, which dies of a full disk, would be waited for for ever."""

    def __init__(self, directory, first_step):
        from tensorboardX import event_file_writer  # half a second of import that a run without it should not pay
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary, self._is_remote = event_pb2.Event, summary_pb2.Summary, is_remote(directory)
        event_file_writer.directory_check(str(directory))
        self._writer = event_file_writer.EventsWriter(f"{directory}/events")
        # What lies in earlier files at or beyond this step is hidden.
        begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=first_step, session_log=begin))

    def write(self, step, values):
        found = [self._summary.Value(tag=name, simple_value=value) for name, value in _scalars(values)]
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=found)))
        if not self._is_remote:
            self._writer.flush()

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
            identity.write_text(secrets.token_hex(4), encoding="utf-8")
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
    """A curve for every number: ("router/max_load", [a, b]) becomes ("router/max_load/0", a) and
    ("router/max_load/1", b).
    """
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
