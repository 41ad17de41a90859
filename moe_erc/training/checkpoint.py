"""Checkpoints: what restores a run, written behind its back and read back bit for bit, onto any mesh.

A checkpoint is one orbax step of two items: `state`, the pytree of arrays (typed keys included), and `meta`, plain
JSON that can be read alone, before anything is compiled. A step appears under its number by a rename once it is
complete, so a run killed while saving leaves its last checkpoint intact.
"""

import json
from collections.abc import Mapping

import jax
import orbax.checkpoint as ocp

from moe_erc.training.paths import absolute


class Checkpoints:
    """The checkpoints in one directory.

    keep: a writer, which keeps the newest `keep` steps, in a directory that was prepared for it.
    None: a reader, which leaves the directory exactly as it is, also while another process trains in it.

    Of several processes each makes its own, and calls what the others call: all of them write and read together.
    """

    def __init__(self, directory, keep=None):
        self._directory = absolute(directory)
        if keep is not None and keep < 1:
            raise ValueError(f"keep = {keep} checkpoints would leave nothing to resume from: keep at least 1")
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=False),
            item_names=("state", "meta"),
        )
        self.newest = self.latest_step() or 0  # step that is there, or being written; 0 before the first

    def latest_step(self) -> int | None:
        """The newest complete step, None before the first."""
        return self._manager.latest_step()

    def save(self, step, state, meta: dict):
        """Copies `state` to the host, then writes in the background: the caller may donate its buffers at once.

        A step that is not newer than the latest is left as it is. A failed write raises at the next save or wait.
        """
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=items)
        self.newest = max(step, self.newest)

    def restore(self, abstract_state, step=None):
        """(state, meta) of a step, the latest by default.

        abstract_state: the state's tree with a `jax.ShapeDtypeStruct` with a sharding for every array. The sharding
        is where the array shall lie now; where it lay when it was saved does not matter.
        """
        items = ocp.args.Composite(state=_restore_args(abstract_state), meta=ocp.args.JsonRestore())
        restored = self._manager.restore(self._existing(step), args=items)
        return restored.state, restored.meta

    def restore_weights(self, abstract, step=None):
        """`params` and `router` of a state alone: moments, two thirds of a checkpoint, are not read."""
        wanted = {"params": abstract.params, "router": abstract.router}
        items = ocp.args.Composite(state=_restore_args(wanted, partial_restore=True))
        return abstract.replace(**self._manager.restore(self._existing(step), args=items).state)

    def read_meta(self, step=None) -> dict:
        """The JSON saved with a step, without touching its arrays."""
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(self._existing(step), args=items).meta

    def wait(self):
        """Returns once every save has reached the disk."""
        self._manager.wait_until_finished()

    def close(self):
        """Waits for the last save and ends the background threads."""
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _existing(self, step):
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {self._directory}: train there first, or name another directory")
        if step is not None and step not in steps:
            raise FileNotFoundError(f"no checkpoint of step {step} in {self._directory}: it holds {steps}")
        return steps[-1] if step is None else step


def _restore_args(abstract, **options):
    def restore_arg(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            # On disk a key is integers with its algorithm noted beside them: shape and dtype are not the leaf's.
            return ocp.ArrayRestoreArgs(sharding=leaf.sharding)
        return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)

    return ocp.args.PyTreeRestore(abstract, restore_args=jax.tree.map(restore_arg, abstract), **options)


def prepare_directory(directory):
    """Makes `directory` ready for a writer: it can be written to and holds nothing that a killed run was still writing.

    PermissionError of one line otherwise, by trying: permission bits say nothing to root, on read-only mounts and in
    buckets. Of several processes the first cleans. Orbax's own cleaning would run in a thread that outlives close().
    """
    directory = absolute(directory)
    probe = directory / f".writable-{jax.process_index()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise PermissionError(f"cannot write to {directory} ({reason}): name a writable directory") from None
    if jax.process_index() == 0:
        for torn in filter(ocp.utils.is_tmp_checkpoint, directory.glob("*")):
            torn.rmtree()


def check_same_run(meta: Mapping, expected: Mapping):
    """ValueError unless `meta` says of everything in `expected` the same; what else `meta` holds does not matter.

    Both are nested plain JSON, e.g. {"model": {"experts": 8}}; the first key that differs is named in full.
    """
    for key, ours in json.loads(json.dumps(expected)).items():
        _check_equal(key, meta.get(key, "absent"), ours)


def _check_equal(key, saved, ours):
    if isinstance(saved, Mapping) and isinstance(ours, Mapping):
        for name in ours | saved:
            _check_equal(f"{key}.{name}", saved.get(name, "absent"), ours.get(name, "absent"))
    elif saved != ours:
        raise ValueError(
            f"the checkpoint was made with {key} = {saved}, this run has {ours}: "
            f"use another --workdir or set {key} back"
        )
