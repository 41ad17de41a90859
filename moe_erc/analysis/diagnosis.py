"""The measures by layer that every method can be compared by: coupling of router and experts, and their specialisation.

Coupling is read off the parameters, for routers that have a row an expert; how differently the experts answer, off all
their outputs on one fixed batch.
"""

import functools

import jax
import numpy as np

from moe_erc.analysis.coupling import measure_coupling, summarize_coupling
from moe_erc.analysis.specialization import pairwise_cosine
from moe_erc.model.context import of_batch
from moe_erc.sharding import replicate


class Diagnosis:
    """`run(weights)` -> {"coupling": measures, or None without router rows; "specialization": {"output_cosine_L"}}.

    `probe` is the fixed batch, on the devices of the model; every expert runs on all its tokens.
    """

    def __init__(self, model, probe):
        experts, self._probe = model.config.experts, probe
        observer = "output_cosine", lambda layer: pairwise_cosine(layer.unit_sum_BTD(), experts, layer.mask_BT), ()
        probed = model.clone(observers=(observer,))

        @functools.partial(jax.jit, out_shardings=replicate(model.mesh))
        def measure(weights, probe):
            tokens = probe["inputs_BT"], probe["mask_BT"]
            output = probed.apply({"params": weights.params}, *tokens, weights.router, of_batch(probe))
            rows_LED, moe = model.router_rows(weights.params), weights.params["layers"]["moe"]
            return {
                "coupling": None if rows_LED is None else measure_coupling(rows_LED, moe["w_gate"], model.mesh),
                "specialization": {"output_cosine_L": output.observed["output_cosine"]},
            }

        self._measure = measure

    def run(self, weights):
        """On the host."""
        return jax.device_get(self._measure(weights, self._probe))


def summarize(measures):
    """{metric name: by layer}, for curves."""
    coupling = measures["coupling"]
    summary = {"experts/output_cosine": measures["specialization"]["output_cosine_L"]}
    return summary | (summarize_coupling(coupling) if coupling else {})


def headline(measures):
    """In a few words."""
    summary = summarize(measures)
    named = (("ERC", "coupling/erc"), ("alignment", "coupling/alignment"), ("output cosine", "experts/output_cosine"))
    return ", ".join(f"{name} {np.mean(summary[key]):.2g}" for name, key in named if key in summary)
