"""Validation loss and bits per byte by domain, and where the tokens went.

Loads are counts of assignments over all domains, divided once. Under top-p a domain whose tokens meet more experts has
more of them.
"""

import copy
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_erc.checks import BadInput
from moe_erc.data.text import validation_batches
from moe_erc.measures import validation
from moe_erc.measures.load import LOAD
from moe_erc.measures.purity import PURITY, purity
from moe_erc.model.context import of_batch
from moe_erc.sharding import replicate

PROBE_ROWS = 8  # sequences on which the outputs of all experts are compared


class Perplexity:
    """Measures the model of `run(weights)` on `windows` of each domain, or on every target of every validation stream.

    `token_losses(x_BTD, head_VD, targets_BT)` is the loss the model trains with; `put` places whole batches on devices.
    """

    def __init__(self, model, corpus, token_losses, put, shape_BT, windows=None):
        if not corpus.streams["validation"]:
            raise BadInput(
                "data.validation_fraction: no document is held out; raise it, or give a source with a validation split "
                "(a directory of text may hold train/ and validation/)"
            )
        self._corpus, self._put, self._shape_BT = corpus, put, shape_BT
        self._windows = windows

        @functools.partial(jax.jit, out_shardings=replicate(model.mesh))
        def sums(weights, batch):
            tokens = batch["inputs_BT"], batch["mask_BT"]
            output = model.apply({"params": weights.params}, *tokens, weights.router, of_batch(batch))
            losses_BT = token_losses(output.x_BTD, output.head_VD, batch["targets_BT"])
            return {
                "loss": jnp.sum(losses_BT * batch["mask_BT"]),
                "tokens": jnp.sum(batch["mask_BT"], dtype=jnp.int32),
                "assignments_LE": output.routing.assignments_E,
            }

        self._sums = sums

    def on(self, windows: int | None) -> "Perplexity":
        """The same program on other windows of each domain; None and 0 are all."""
        other = copy.copy(self)
        other._windows = windows
        return other

    def run(self, weights: Any) -> dict[str, Any]:
        """Loss, bits per byte and tokens by domain, the mean loss, and the load (L, E), as shares.

        Of several domains the purity of routing, and of a corpus whose entropy is known the
        distance to it.
        """
        found = {}
        losses = []
        distances = []
        assignments = []
        for domain, stream in self._corpus.streams["validation"].items():
            total = self._total(weights, domain)
            loss = float(total["loss"] / total["tokens"])
            tokens_per_byte = (len(stream.tokens_N) - 1) / stream.bytes
            losses.append(loss)
            found[validation.LOSS.of(domain).key] = loss
            found[validation.BITS.of(domain).key] = loss / math.log(2) * tokens_per_byte
            found[validation.TOKENS.of(domain).key] = int(total["tokens"])
            assignments.append(total["assignments_LE"])
            if domain in self._corpus.floors:
                distances.append(loss - self._corpus.floors[domain])
                found[validation.FLOOR_DISTANCE.of(domain).key] = distances[-1]
        found[validation.LOSS.of(validation.MEAN).key] = float(np.mean(losses))
        # A mean over some of the domains would be no distance of the mean loss.
        if len(distances) == len(losses):
            found[validation.FLOOR_DISTANCE.of(validation.MEAN).key] = float(np.mean(distances))
        if len(assignments) > 1:
            found[PURITY.key] = purity(np.stack(assignments))
        assignments_LE = np.sum(assignments, axis=0)
        found[LOAD.key] = assignments_LE / np.maximum(assignments_LE.sum(axis=-1, keepdims=True), 1)
        return found

    def probe(self, devices):
        """The first rows of the first domain, on the devices: the same tokens for every model and mesh."""
        rows, domain = -(-PROBE_ROWS // devices) * devices, next(iter(self._corpus.streams["validation"]))
        batch = next(iter(validation_batches(self._corpus, domain, self._shape_BT[1], rows, None)))
        counted_B1 = np.arange(rows)[:, None] < PROBE_ROWS  # the others give every device its share
        return self._put(batch | {"mask_BT": batch["mask_BT"] & counted_B1})

    def _total(self, weights, domain):
        batch_size, length = self._shape_BT
        batches = validation_batches(self._corpus, domain, length, batch_size, self._windows)
        totals = [jax.device_get(self._sums(weights, self._put(batch))) for batch in batches]

        def total(*leaves):  # of many batches: counts as int64, losses as float64
            wide = np.int64 if np.issubdtype(np.asarray(leaves[0]).dtype, np.integer) else np.float64
            return np.sum(leaves, axis=0, dtype=wide)

        return jax.tree.map(total, *totals)
