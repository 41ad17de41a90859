"""The last words of a run that cannot go on: what went wrong, where in the model, and what is left to go on from.

What a step needs to be looked at again is all there: a stopped guard keeps the state as the step
found it, and the data are a function of the step. So the step is taken apart only now, and its
batch is kept beside the run.
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

STOPPED = 3
NOT_WRITTEN = 1  # exit codes


class LastWords:
    """`gradients_of` is `step.step_gradients`.

    `batches_from(step)` whole batches of the steps behind it.
    """

    def __init__(self, workdir, gradients_of, batches_from):
        self._workdir = workdir
        self._gradients_of = gradients_of
        self._batches_from = batches_from

    def say(self, error: Exception, state: Any, newest: int) -> int:
        """Prints them in one line and returns the exit code.

        `newest` is the step of the last good checkpoint.
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


EXPECTED = (Stopped, SaveError, OSError)


def save_batch(path: epath.Path, batch: Mapping) -> None:
    """Writes {name: array} for `numpy.load`."""
    file = io.BytesIO()
    np.savez(file, **batch)
    path.write_bytes(file.getvalue())


def find_origin(gradients_of: Callable, state: Any, batch: Mapping, step: int) -> str:
    """The parameter, or else the gradient, of the largest number in a step's first half; what is no number is largest.

    All that a layer passes on to those below it is then no number either: of several the deepest is
    named.
    """
    mesh = jax.tree.leaves(state.params)[0].sharding.mesh

    def largest(state, batch):
        gradients, _, _ = gradients_of(state.replace(step=jnp.int32(step - 1)), batch)
        return jax.tree_util.tree_map_with_path(_largest, (state.params, gradients))

    of_state = jax.jit(largest, out_shardings=replicate(mesh))
    parameters, gradients = jax.device_get(of_state(state, put_whole_batch(mesh, batch)))
    found = deepest(parameters)
    kind = "parameter"
    if np.isfinite(found[0]):
        kind = "gradient of"
        found = deepest(gradients)
    value, layer, name = found
    place = f"{kind} {name}" + (f" in layer {layer}" if layer >= 0 else "")
    return (
        f"{place} is not finite"
        if np.isinf(value)
        else f"the largest number, {value:.3g}, is in {place}"
    )


def _largest(path, leaf):
    """Of a tensor, by layer where it has layers; inf for what is not finite."""
    by_layer = jax.tree_util.DictKey("layers") in path
    size = jnp.where(jnp.isfinite(leaf), jnp.abs(leaf), jnp.inf).astype(jnp.float32)
    return jnp.max(size, axis=tuple(range(int(by_layer), size.ndim)))


def deepest(tree: Any) -> tuple[float, int, str]:
    """(value, layer, name) of the largest; -1 for a tensor without layers, which comes last."""
    return max(
        (
            float(value),
            layer if np.ndim(values_L) else -1,
            jax.tree_util.keystr(path, simple=True, separator="."),
        )
        for path, values_L in jax.tree_util.tree_leaves_with_path(tree)
        for layer, value in enumerate(np.atleast_1d(values_L))
    )
