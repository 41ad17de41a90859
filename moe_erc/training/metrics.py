"""Writes metrics to a JSON-lines file and, if asked, to TensorBoard and Weights & Biases.

No writer ends a run before its checkpoint. An error of the file is kept, and raised by `check`. The
two others are copies for the eye: one that fails is switched off with one line.

On several processes, process 0 writes. A resumed run goes on where its checkpoint was, in all
three.
"""

import functools
import importlib.util
import re
import secrets
import sys
import time
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_erc.checks import BadInput
from moe_erc.data.paths import absolute, is_remote
from moe_erc.training.json_lines import LocalJsonLines, RemoteJsonLines


def check_package(wandb_project: str) -> None:
    """BadInput where Weights & Biases is asked for and not installed."""
    if wandb_project and importlib.util.find_spec("wandb") is None:
        raise BadInput(
            f"log.wandb_project: {wandb_project!r} needs wandb: "
            'pip install "moe_erc[wandb]", or leave it empty'
        )


class MetricWriter:
    """Writes to every sink asked for; on other processes than 0 it does nothing."""

    def __init__(
        self, directory, tensorboard: bool, wandb_project: str, config: dict, first_step: int = 0
    ):
        """Opens metrics.jsonl and the copies in a directory, which is created where it is missing.

        wandb_project: "" does not use Weights & Biases.
        config: plain JSON, which Weights & Biases shows beside the curves.
        first_step: the first step this run will write; a resumed run passes the restored step + 1.
        """
        self._file = None
        self._copies = []
        self._error = None
        if jax.process_index() != 0:
            return
        directory = absolute(directory)
        directory.mkdir(parents=True, exist_ok=True)
        json_lines = RemoteJsonLines if is_remote(directory) else LocalJsonLines
        self._file = json_lines(directory / "metrics.jsonl", first_step)
        if tensorboard:
            make = functools.partial(_TensorBoard, directory / "tensorboard", first_step)
            self._copies.append(_Copy("TensorBoard", make))
        if wandb_project:
            make = functools.partial(_WeightsAndBiases, wandb_project, directory, config)
            self._copies.append(_Copy("Weights & Biases", make))

    def write(self, step: int, metrics: Mapping) -> None:
        """Writes {name: number or (nested) list of numbers}.

        Arrays are fetched from the device here.
        """
        values = {name: np.asarray(value, np.float64).tolist() for name, value in metrics.items()}
        self._ask_all("write", int(step), values)

    def flush(self) -> None:
        """Makes what was written safe, in a bucket too.

        It must be called before a checkpoint: a run resumed from that does not write these steps
        again.
        """
        self._ask_all("flush")

    def close(self) -> None:
        """Flushes and closes every sink; raises as `check` does."""
        self._ask_all("close")
        self.check()

    def check(self) -> None:
        """Raises the error that kept metrics.jsonl from being written, if there is one.

        It is to be called once the step's checkpoint is being saved.
        """
        if self._error:
            raise self._error

    def holds(self, step: int, name: str) -> bool:
        """Whether metrics.jsonl has that metric for that step; the same on every process."""
        found = self._file is not None and self._file.holds(step, name)
        return bool(multihost_utils.broadcast_one_to_all(np.bool_(found)))

    def _ask_all(self, what, *arguments):
        if self._file is not None and self._error is None:
            try:
                getattr(self._file, what)(*arguments)
            # `check` raises it. The error of a bucket need not be an OSError.
            except Exception as error:
                self._error = error
        for copy in self._copies:
            copy.ask(what, *arguments)

    def __enter__(self):
        return self

    def __exit__(self, _kind, error, _trace):
        self._ask_all("close")
        # Another error ends the run already, and must not be hidden.
        if error is None:
            self.check()


class _Copy:
    """A sink beside metrics.jsonl, made by `make`. When it fails, it is switched off with one line.

    The error may be one of a library, its process, a disk or the network.
    """

    def __init__(self, name, make):
        self._name = name
        self._sink = None
        try:
            self._sink = make()
        except Exception as error:
            self._switch_off(error)

    def ask(self, what, *arguments):
        """Calls that method of the sink, unless it is switched off."""
        if self._sink is None:
            return
        try:
            getattr(self._sink, what)(*arguments)
        except Exception as error:
            self._switch_off(error)

    def _switch_off(self, error):
        self._sink = None
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"{self._name} is switched off ({reason}); metrics.jsonl goes on", file=sys.stderr)


class _TensorBoard:
    """TensorBoard's event files, written at once.

    The library's own writer uses a thread. A full disk would end the thread, and the run would wait
    for it for ever.
    """

    def __init__(self, directory, first_step):
        # Imported here: it takes half a second, which a run without TensorBoard should not wait.
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event = event_pb2.Event
        self._summary = summary_pb2.Summary
        self._is_remote = is_remote(directory)
        event_file_writer.directory_check(str(directory))
        self._writer = event_file_writer.EventsWriter(f"{directory}/events")
        # What lies in earlier files at or beyond this step is hidden.
        begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(
            event_pb2.Event(wall_time=time.time(), step=first_step, session_log=begin)
        )

    def write(self, step, values):
        found = []
        for name, value in _scalars(values):
            found.append(self._summary.Value(tag=name, simple_value=value))
        summary = self._summary(value=found)
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        if not self._is_remote:
            self._writer.flush()

    def flush(self):
        self._writer.flush()

    def close(self):
        self._writer.close()


class _WeightsAndBiases:
    """A run of Weights & Biases. The resumed run continues its own curves there."""

    def __init__(self, project, directory, config):
        import wandb

        # The id lies beside the checkpoints, where a resumed run finds it.
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
    """(name, number) of one curve for every number.

    ("router/max_load", [a, b]) becomes ("router/max_load/0", a) and ("router/max_load/1", b).
    """
    for name, value in values.items():
        for index, number in np.ndenumerate(np.asarray(value)):
            yield "/".join([name, *map(str, index)]), float(number)


# Dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets. The first pattern that is
# found in the device's kind decides. A device is a chip, except for TPU v2, v3 and 7x, where it is
# one of the chip's two cores.
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


def peak_flops(device_kind: str) -> float | None:
    """The peak FLOP/s of a device of this `jax.Device.device_kind`, for the MFU.

    None where it is not known, as for a CPU.
    """
    # A slice of a GPU carries the name of the whole.
    if "MIG" in device_kind:
        return None
    for pattern, peak in PEAK_FLOPS:
        if re.search(rf"\b({pattern})\b", device_kind):
            return peak
    return None
