"""Validation loss and bits per byte by domain, and the load of the experts.

A load counts assignments over all domains and is divided once, at the end. Under top-p a domain
whose tokens meet more experts has more assignments.
"""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_erc.checks import BadInput
from moe_erc.data.text import Corpus, validation_batches
from moe_erc.measures import validation
from moe_erc.measures.load import LOAD
from moe_erc.measures.purity import PURITY, purity
from moe_erc.model.context import of_batch
from moe_erc.model.transformer import Transformer
from moe_erc.sharding import replicate

PROBE_ROWS = 8  # sequences on which the outputs of all experts are compared


class Perplexity:
    """Measures a model on `windows` of each domain, or on every target of every validation stream.

    `token_losses(x_BTD, head_VD, targets_BT)` is the loss that the model trains with. `put` places
    whole batches on devices.
    """

    def __init__(
        self,
        model: Transformer,
        corpus: Corpus,
        token_losses: Callable,
        put: Callable,
        shape_BT: tuple[int, int],
        windows: int | None = None,
    ):
        if not corpus.streams["validation"]:
            raise BadInput(
                "data.validation_fraction: no document is held out; raise it, or give a source "
                "with a validation split (a directory of text may hold train/ and validation/)"
            )
        self._corpus = corpus
        self._put = put
        self._shape_BT = shape_BT
        self._windows = windows

        @functools.partial(jax.jit, out_shardings=replicate(model.mesh))
        def sums(weights, batch):
            tokens = (batch["inputs_BT"], batch["mask_BT"])
            output = model.apply(
                {"params": weights.params}, *tokens, weights.router, of_batch(batch)
            )
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

        Token shards do not say their bytes, so that they have no bits per byte.
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
            losses.append(loss)
            found[validation.LOSS.of(domain).key] = loss
            if stream.bytes is not None:
                tokens_per_byte = (len(stream.tokens_N) - 1) / stream.bytes
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

    def probe(self, devices: int) -> dict[str, jax.Array]:
        """The first rows of the first domain, placed on the devices.

        The tokens are the same for every model and mesh.
        """
        rows = -(-PROBE_ROWS // devices) * devices
        domain = next(iter(self._corpus.streams["validation"]))
        batch = next(iter(validation_batches(self._corpus, domain, self._shape_BT[1], rows, None)))
        # Rows beyond the first ones only fill up every device; they are masked.
        counted_B1 = np.arange(rows)[:, None] < PROBE_ROWS
        return self._put(batch | {"mask_BT": batch["mask_BT"] & counted_B1})

    def _total(self, weights, domain):
        batch_size, length = self._shape_BT
        batches = validation_batches(self._corpus, domain, length, batch_size, self._windows)
        totals = [jax.device_get(self._sums(weights, self._put(batch))) for batch in batches]

        return jax.tree.map(_sum, *totals)


def _sum(*leaves):
    """The sum over batches: counts in int64, losses in float64."""
    is_count = np.issubdtype(np.asarray(leaves[0]).dtype, np.integer)
    return np.sum(leaves, axis=0, dtype=np.int64 if is_count else np.float64)
