"""The measures by layer that every method can be compared by, of a model in training.

Coupling is read off the parameters, for routers that have a row for every expert. The measures that
read a layer see it on one fixed batch.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moe_erc.diagnosis.coupling import measure_coupling
from moe_erc.measures import coupling, erc, output_cosine, validation
from moe_erc.measures.registry import reading
from moe_erc.model.context import of_batch
from moe_erc.sharding import replicate

HEADLINE = (
    validation.LOSS.of(validation.MEAN),
    erc.ERC,
    coupling.ALIGNMENT,
    output_cosine.OUTPUT_COSINE,
)


class Diagnosis:
    """The measures that read layers, coupling matrices and weights, of the model of `run(weights)`.

    `probe` is the fixed batch, on the devices of the model. Every expert runs on all its tokens for
    output cosine.
    """

    def __init__(self, model: Any, probe: Mapping[str, jax.Array]):
        self._probe = probe
        of_layer = [measure for measure in reading("layer") if measure.applies(model.config)]
        observers = tuple((measure.key, measure.compute, ()) for measure in of_layer)
        probed = model.clone(observers=observers)

        @functools.partial(jax.jit, out_shardings=replicate(model.mesh))
        def measure(weights, probe):
            tokens = probe["inputs_BT"], probe["mask_BT"]
            variables = {"params": weights.params}
            output = probed.apply(variables, *tokens, weights.router, of_batch(probe))
            rows_LED = model.router_rows(weights.params)
            if rows_LED is None:
                return output.observed
            w_gate_LEDF = weights.params["layers"]["moe"]["w_gate"]
            return measure_coupling(rows_LED, w_gate_LEDF, model.mesh) | output.observed

        self._measure = measure

    def run(self, weights: Any) -> dict[str, np.ndarray]:
        """{key: (L,)}, on the host; nothing of coupling for a router without rows."""
        return jax.device_get(self._measure(weights, self._probe))


def headline(found: Mapping[str, Any]) -> str:
    """What an evaluation found, in a few words: means over layers."""
    shown = [measure for measure in HEADLINE if measure.key in found]
    return ", ".join(f"{measure.label} {np.mean(found[measure.key]):.4g}" for measure in shown)
