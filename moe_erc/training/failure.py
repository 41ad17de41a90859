"""The last words of a run that cannot go on.

They say what went wrong, where in the model, and from which checkpoint the run can go on.

A failed step is analysed only after the run has stopped. Everything it needs is still there: a
stopped guard keeps the state as the step found it, and the data are a function of the step. The
batch is saved beside the run.
"""

import io
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from moe_erc.sharding import put_whole_batch, replicate
from moe_erc.training.checkpoint import SaveError
from moe_erc.training.guard import Stopped

# Exit codes.
STOPPED = 3
NOT_WRITTEN = 1

# The errors after which a run ends with last words.
EXPECTED = (Stopped, SaveError, OSError)


class LastWords:
    """What prints the last words of a run in `workdir`.

    gradients_of: what `step.step_gradients` returns.
    batches_from: batches_from(step) iterates over the whole batches of the steps after `step`.
    """

    def __init__(self, workdir, gradients_of, batches_from):
        self._workdir = workdir
        self._gradients_of = gradients_of
        self._batches_from = batches_from

    def say(self, error: Exception, state: Any, newest: int) -> int:
        """Prints the last words in one line and returns the exit code.

        state: the state as the failed step found it.
        newest: the step of the last good checkpoint.
        """
        line = " ".join(str(error).split())
        code = NOT_WRITTEN
        if isinstance(error, Stopped):
            batch = next(self._batches_from(error.step - 1))
            path = self._workdir / f"batch-{error.step}.npz"
            line = f"{line}; {find_origin(self._gradients_of, state, batch, error.step)}"
            if jax.process_index() == 0:
                save_batch(path, batch)
            line = f"{line}; its batch is {path}"
            code = STOPPED
        print(f"error: {line}; the last good checkpoint is of step {newest}", file=sys.stderr)
        return code


def save_batch(path: epath.Path, batch: Mapping) -> None:
    """Writes {name: array} as an .npz file for `numpy.load`."""
    file = io.BytesIO()
    np.savez(file, **batch)
    path.write_bytes(file.getvalue())


def find_origin(gradients_of: Callable, state: Any, batch: Mapping, step: int) -> str:
    """Where the largest number of a failed step is, in words: in a parameter or in a gradient.

    A number that is not finite counts as the largest. Parameters are looked at first. Where several
    layers hold numbers that are not finite, the deepest is named: in the backward pass it hands
    them to the layers below it.
    """
    mesh = jax.tree.leaves(state.params)[0].sharding.mesh

    def largest(state, batch):
        gradients, _, _ = gradients_of(state.replace(step=jnp.int32(step - 1)), batch)
        return jax.tree_util.tree_map_with_path(_largest, (state.params, gradients))

    of_state = jax.jit(largest, out_shardings=replicate(mesh))
    parameters, gradients = jax.device_get(of_state(state, put_whole_batch(mesh, batch)))
    value, layer, name = deepest(parameters)
    kind = "parameter"
    if np.isfinite(value):
        kind = "gradient of"
        value, layer, name = deepest(gradients)
    place = f"{kind} {name}"
    if layer >= 0:
        place += f" in layer {layer}"
    if np.isinf(value):
        return f"{place} is not finite"
    return f"the largest number, {value:.3g}, is in {place}"


def _largest(path, leaf):
    """The largest absolute value of a tensor, by layer where it has layers; inf if not finite."""
    by_layer = jax.tree_util.DictKey("layers") in path
    size = jnp.where(jnp.isfinite(leaf), jnp.abs(leaf), jnp.inf).astype(jnp.float32)
    return jnp.max(size, axis=tuple(range(int(by_layer), size.ndim)))


def deepest(tree: Any) -> tuple[float, int, str]:
    """(value, layer, name) of the largest value; of equal values, the one in the deepest layer.

    The layer of a tensor without layers is -1: of equal values it comes last.
    """
    found = []
    for path, values_L in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        has_layers = np.ndim(values_L) > 0
        for layer, value in enumerate(np.atleast_1d(values_L)):
            found.append((float(value), layer if has_layers else -1, name))
    return max(found)
