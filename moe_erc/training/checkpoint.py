"""Checkpoints: what restores a run, written in the background and read back bit for bit.

A checkpoint is one orbax step of three items:

    state    the pytree of arrays, typed keys included; it can be restored onto any mesh
    meta     plain JSON that can be read alone, before anything is compiled
    digests  sizes and CRCs of the files of the other two: `digests.py`

A step appears under its number by a rename once it is complete. So a run that is killed while it
saves leaves its last checkpoint intact.
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

MANY = 100  # the most checkpoints that are searched for an intact one


class SaveError(Exception):
    """A checkpoint that could not be written."""


class Checkpoints:
    """The checkpoints in one directory.

    keep: a number makes a writer, which keeps the newest `keep` steps; its directory was made ready
        by `prepare_directory`. None makes a reader, which leaves the directory exactly as it is,
        also while another process trains in it.

    Of several processes each makes its own, and all of them must call the same methods: they write
    and read together.
    """

    def __init__(self, directory, keep=None):
        self._directory = absolute(directory)
        if keep is not None:
            in_range("checkpoint.keep", keep, Range(least=1))
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=False),
            # The items are completed in this order: digests last, when the others are on the disk.
            item_handlers={
                contents.STATE: ocp.PyTreeCheckpointHandler(),
                contents.META: ocp.JsonCheckpointHandler(),
                digests.ITEM: digests.DigestHandler(),
            },
        )
        self._is_writer = keep is not None
        # The newest step that is there, or being written; 0 before the first.
        self.newest = self.latest_step() or 0

    def latest_step(self) -> int | None:
        """The newest complete step, None before the first."""
        return self._manager.latest_step()

    def newest_intact(self) -> int:
        """The newest step that is what was saved; 0 before the first.

        Newer steps that are damaged are named on stderr. A writer sets them aside, so that their
        steps can be saved again. BadInput if all steps are damaged: a run that lost its checkpoints
        does not begin anew by itself.
        """
        intact = 0
        faults = {}
        for step in self._steps_of_the_first():
            fault = digests.find_fault(self._directory / str(step))
            if not fault:
                intact = step
                break
            faults[step] = fault
        if faults and not intact:
            listed = "; ".join(f"step {step}: {fault}" for step, fault in faults.items())
            raise BadInput(
                f"no intact checkpoint in {self._directory} ({listed}): "
                "put a copy back or name another"
            )
        for step, fault in faults.items():
            self._pass_over(step, f"checkpoint {step} is damaged ({fault}): step {intact} is used")
        self.newest = intact
        return intact

    def _steps_of_the_first(self):
        """The steps that process 0 sees, the newest first.

        All processes take its list, because a run may be writing while they look.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)[:MANY]
        padded = np.pad(np.array(steps, np.int32), (0, MANY - len(steps)), constant_values=-1)
        return [int(step) for step in multihost_utils.broadcast_one_to_all(padded) if step >= 0]

    def _pass_over(self, step, line):
        """Says that a step is damaged; a writer renames its directory."""
        is_first = jax.process_index() == 0
        if not self._is_writer:
            if is_first:
                print(line, file=sys.stderr)
            return
        if is_first:
            aside = self._directory / f"damaged-{step}"
            print(f"{line}, it is kept as {aside.name}", file=sys.stderr)
            if aside.exists():
                aside.rmtree()
            (self._directory / str(step)).rename(aside)
        # No process lists the steps again before the rename is done.
        multihost_utils.sync_global_devices(f"step {step} is set aside")
        self._manager.reload()

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Copies `state` to the host, and writes it in the background.

        The caller may donate the buffers of `state` at once. A step that is not newer than the
        latest is left as it is. A write that fails raises SaveError at the next save, wait or
        close.
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

        abstract_state: the state's tree, with a `jax.ShapeDtypeStruct` for every array, whose
            sharding says where the array shall lie. It may differ from where it lay when it was
            saved.

        BadInput if there is no such step.
        """
        items = ocp.args.Composite(state=_restore_args(abstract_state), meta=ocp.args.JsonRestore())
        restored = self._manager.restore(self._existing(step), args=items)
        return restored.state, restored.meta

    def restore_weights(self, abstract: Any, step: int | None = None) -> Any:
        """`abstract` with the `params` and `router` of a step, the latest by default.

        Optimizer moments, two thirds of a checkpoint, are not read.
        """
        wanted = {"params": abstract.params, "router": abstract.router}
        items = ocp.args.Composite(state=_restore_args(wanted, partial_restore=True))
        restored = self._manager.restore(self._existing(step), args=items)
        return abstract.replace(**restored.state)

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
            # Another error ends the run already: that one is raised, this one is printed.
            print(f"error: {failure}", file=sys.stderr)

    @contextlib.contextmanager
    def _writing(self):
        """Turns whatever a write raises into a SaveError of one line."""
        try:
            yield
        # Orbax lets through whatever its back ends raise.
        except Exception as error:
            self.newest = self.latest_step() or 0
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise SaveError(
                f"a checkpoint could not be written to {self._directory} ({reason})"
            ) from error

    def _existing(self, step):
        """The step, or the latest for None; BadInput where it does not exist."""
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
            # On disk a key is integers, with its algorithm noted beside them. Shape and dtype there
            # are not the leaf's.
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
    if not directory.exists():
        return False
    return any(path.name.isdecimal() for path in directory.iterdir())


def prepare_directory(directory: epath.PathLike) -> TextIO | None:
    """Makes `directory` ready for a writer, and returns the lock that makes it the only one.

    It creates the directory and removes what a killed run was still writing. The lock, of process 0
    alone, is to be kept as long as the run; None on other processes and where there are no locks.

    BadInput for a directory that cannot be written to, and for one whose name is no UTF-8.
    """
    directory = absolute(directory)
    # A command line may hold bytes that are no UTF-8; the library of checkpoints takes UTF-8 alone.
    try:
        str(directory).encode()
    except UnicodeEncodeError:
        mend = "name another directory, or set LC_ALL=C.UTF-8 if it is UTF-8"
        raise BadInput(
            f"cannot keep checkpoints in {str(directory)!r}, which is no text in UTF-8: {mend}"
        ) from None
    # Whether it is writable is tried: permission bits tell nothing about root, read-only mounts and
    # buckets.
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
    # Before anything is removed: it might be what another run is writing.
    held = lock(directory)
    # Orbax could remove these itself, but in a thread that outlives close().
    for torn in filter(ocp.utils.is_tmp_checkpoint, directory.glob("*")):
        torn.rmtree()
    return held
