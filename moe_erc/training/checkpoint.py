"""Checkpoints: what restores a run, written behind its back and read back bit for bit, onto any mesh.

A checkpoint is one orbax step of three items: `state`, the pytree of arrays (typed keys included),
`meta`, plain JSON that can be read alone, before anything is compiled, and `digests.py` of both. A
step appears under its number by a rename once it is complete, so a run killed while saving leaves
its last checkpoint intact.
"""

import contextlib
import sys
from typing import Any, TextIO

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from moe_erc.checks import BadInput, Range, in_range
from moe_erc.data.paths import absolute
from moe_erc.training import contents, digests
from moe_erc.training.lock import lock

MANY = 100  # checkpoints that are looked at


class SaveError(Exception):
    """A checkpoint that could not be written."""


class Checkpoints:
    """The checkpoints in one directory.

    keep: a writer, which keeps the newest `keep` steps, in a directory that was prepared for it.
    None: a reader, which leaves the directory exactly as it is, also while another process trains
    in it.

    Of several processes each makes its own, and calls what the others call: all of them write and
    read together.
    """

    def __init__(self, directory, keep=None):
        self._directory = absolute(directory)
        if keep is not None:
            in_range("checkpoint.keep", keep, Range(least=1))
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=False),
            # In this order they are completed.
            item_handlers={
                contents.STATE: ocp.PyTreeCheckpointHandler(),
                contents.META: ocp.JsonCheckpointHandler(),
                digests.ITEM: digests.DigestHandler(),
            },
        )
        self._writes = keep is not None
        # Step that is there, or being written; 0 before the first.
        self.newest = self.latest_step() or 0

    def latest_step(self) -> int | None:
        """The newest complete step, None before the first."""
        return self._manager.latest_step()

    def newest_intact(self) -> int:
        """The newest step that is what was saved, 0 before the first; damaged ones that are newer are named.

        A writer sets those aside, so that their steps can be saved again. ValueError if there are
        only damaged ones: a run that lost its checkpoints does not begin anew by itself.
        """
        intact = 0
        faults = {}
        for step in self._steps_of_the_first():
            if not (fault := digests.find_fault(self._directory / str(step))):
                intact = step
                break
            faults[step] = fault
        if faults and not intact:
            listed = "; ".join(f"step {step}: {fault}" for step, fault in faults.items())
            raise BadInput(
                f"no intact checkpoint in {self._directory} ({listed}): put a copy back or name another"
            )
        for step, fault in faults.items():
            self._pass_over(step, f"checkpoint {step} is damaged ({fault}): step {intact} is used")
        self.newest = intact
        return intact

    def _steps_of_the_first(self):
        """The newest first, as process 0 sees them: a run may be writing while several processes look."""
        steps = sorted(self._manager.all_steps(), reverse=True)[:MANY]
        padded = np.pad(np.array(steps, np.int32), (0, MANY - len(steps)), constant_values=-1)
        return [int(step) for step in multihost_utils.broadcast_one_to_all(padded) if step >= 0]

    def _pass_over(self, step, line):
        aside = self._directory / f"damaged-{step}"
        if jax.process_index() == 0:
            print(f"{line}, it is kept as {aside.name}" if self._writes else line, file=sys.stderr)
            if self._writes:
                if aside.exists():
                    aside.rmtree()
                (self._directory / str(step)).rename(aside)
        if self._writes:
            multihost_utils.sync_global_devices(f"step {step} is set aside")
            self._manager.reload()

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Copies `state` to the host, then writes in the background: the caller may donate its buffers at once.

        A step that is not newer than the latest is left as it is. A failed write is a SaveError at
        the next save, wait or close.
        """
        items = {
            contents.STATE: ocp.args.PyTreeSave(state),
            contents.META: ocp.args.JsonSave(meta),
            digests.ITEM: digests.DigestSave(contents.shapes_on_disk(state)),
        }
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items))
        self.newest = max(step, self.newest)

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict]:
        """(state, meta) of a step, the latest by default.

        abstract_state: the state's tree with a `jax.ShapeDtypeStruct` with a sharding for every
        array. The sharding is where the array shall lie now; where it lay when it was saved does
        not matter.
        """
        items = ocp.args.Composite(state=_restore_args(abstract_state), meta=ocp.args.JsonRestore())
        restored = self._manager.restore(self._existing(step), args=items)
        return restored.state, restored.meta

    def restore_weights(self, abstract: Any, step: int | None = None) -> Any:
        """`params` and `router` of a state alone: moments, two thirds of a checkpoint, are not read."""
        wanted = {"params": abstract.params, "router": abstract.router}
        items = ocp.args.Composite(state=_restore_args(wanted, partial_restore=True))
        return abstract.replace(**self._manager.restore(self._existing(step), args=items).state)

    def read_meta(self, step: int | None = None) -> dict:
        """The JSON saved with a step, without touching its arrays."""
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(self._existing(step), args=items).meta

    def wait(self) -> None:
        """Returns once every save has reached the disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and ends the background threads."""
        with self._writing():
            self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, _kind, error, _trace):
        try:
            self.close()
        except SaveError as failure:
            if error is None or isinstance(error, SaveError):
                raise
            print(
                f"error: {failure}", file=sys.stderr
            )  # beside what ends the run, which goes on its way

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except Exception as error:  # orbax lets through what its back ends raise
            self.newest = self.latest_step() or 0
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise SaveError(
                f"a checkpoint could not be written to {self._directory} ({reason})"
            ) from error

    def _existing(self, step):
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise BadInput(
                f"no checkpoint in {self._directory}: train there first, or name another directory"
            )
        if step is not None and step not in steps:
            raise BadInput(f"no checkpoint of step {step} in {self._directory}: it holds {steps}")
        return steps[-1] if step is None else step


def _restore_args(abstract, **options):
    def restore_arg(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            # On disk a key is integers with its algorithm noted beside them: shape and dtype are
            # not the leaf's.
            return ocp.ArrayRestoreArgs(sharding=leaf.sharding)
        return ocp.ArrayRestoreArgs(
            sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
        )

    return ocp.args.PyTreeRestore(
        abstract, restore_args=jax.tree.map(restore_arg, abstract), **options
    )


def holds_steps(directory: epath.PathLike) -> bool:
    """Whether there is any checkpoint in a directory, intact or not."""
    directory = absolute(directory)
    return directory.exists() and any(path.name.isdecimal() for path in directory.iterdir())


def prepare_directory(directory: epath.PathLike) -> TextIO | None:
    """Makes `directory` ready for a writer: it can be written to and holds nothing that a killed run was still writing.

    Returns the lock by which process 0 is its only writer, to be kept as long as the run.
    PermissionError of one line where it cannot be written to, by trying: permission bits say
    nothing to root, on read-only mounts and in buckets. Of several processes the first cleans.
    Orbax's own cleaning would run in a thread that outlives close().
    """
    directory = absolute(directory)
    try:
        str(directory).encode()
    except (
        UnicodeEncodeError
    ):  # bytes of a command line that are no UTF-8; the checkpoints' library takes UTF-8 alone
        mend = "name another directory, or set LC_ALL=C.UTF-8 if it is UTF-8"
        raise BadInput(
            f"cannot keep checkpoints in {str(directory)!r}, which is no text in UTF-8: {mend}"
        ) from None
    probe = directory / f".writable-{jax.process_index()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(
            f"cannot write to {directory} ({reason}): name a writable directory"
        ) from None
    if jax.process_index() > 0:
        return None
    held = lock(directory)  # before anything is removed: it might be what another run is writing
    for torn in filter(ocp.utils.is_tmp_checkpoint, directory.glob("*")):
        torn.rmtree()
    return held
