"""Which experts the tokens of every validation domain meet: counts, and the measures of `measures/expert_use.py`.

A token counts where it is predicted from, as in the validation loss. Empty slots and masked tokens count nowhere.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_erc.data.text import validation_batches
from moe_erc.measures import expert_use
from moe_erc.measures.expert_use import coactivation, domain_divergence, token_specialization
from moe_erc.model.context import of_batch
from moe_erc.sharding import replicate


class ExpertUse:
    """Measures the model of `run(weights)` on `windows` of each domain, or all; `put` places whole batches."""

    def __init__(self, model, corpus, put, shape_BT, windows=None):
        self._windows = windows
        self._corpus, self._put, self._shape_BT = corpus, put, shape_BT
        config = model.config

        def experts_BTK(layer):
            return jnp.where(layer.chosen_BTK, layer.routing.experts_BTK, config.experts)

        observed = model.clone(observers=(("experts", experts_BTK, ()),))

        @functools.partial(jax.jit, out_shardings=replicate(model.mesh))
        def count(weights, batch):
            tokens_BT, context = batch["inputs_BT"], of_batch(batch)
            output = observed.apply({"params": weights.params}, tokens_BT, batch["mask_BT"], weights.router, context)

            def of_layer(experts_BTK):
                zeros_VE = jnp.zeros((config.vocab_size, config.experts), jnp.int32)
                active_BTE = jax.nn.one_hot(experts_BTK, config.experts, dtype=jnp.int32).sum(axis=-2)
                return {
                    "counts_LVE": zeros_VE.at[tokens_BT[..., None], experts_BTK].add(1, mode="drop"),
                    "pairs_LEE": jnp.einsum("bte,btf->ef", active_BTE, active_BTE),
                }

            occurrences_V = jnp.zeros(config.vocab_size, jnp.int32).at[tokens_BT].add(batch["mask_BT"])
            return jax.lax.map(of_layer, output.observed["experts"]) | {"occurrences_V": occurrences_V}

        self._count = count

    def run(self, weights: Any) -> dict[str, np.ndarray]:
        """By key: divergence of domains and specialisation of tokens, (L,) each, load by domain
        (G, L, E) and co-activation (L, E, E).
        """
        counts = self.count(weights)
        return {
            expert_use.LOAD.key: counts["load_GLE"],
            expert_use.DIVERGENCE.key: domain_divergence(counts["load_GLE"]),
            expert_use.TOKEN_SPECIALIZATION.key: token_specialization(counts["counts_LVE"], counts["occurrences_V"]),
            expert_use.COACTIVATION.key: coactivation(counts["pairs_LEE"]),
        }

    def count(self, weights: Any) -> dict[str, np.ndarray]:
        """Integers: "counts_LVE" of a token id and an expert, "pairs_LEE" of tokens that met both experts,
        "occurrences_V" of a token id; and "load_GLE", the share of a domain's assignments.
        """
        batch_size, length = self._shape_BT
        by_domain = {}
        for domain in self._corpus.streams["validation"]:
            batches = validation_batches(self._corpus, domain, length, batch_size, self._windows)
            # int32 of one batch; as int64, those of any number of batches add up.
            counts = (jax.tree.map(np.int64, jax.device_get(self._count(weights, self._put(b)))) for b in batches)
            by_domain[domain] = functools.reduce(lambda a, b: jax.tree.map(np.add, a, b), counts)
        assigned_GLE = np.stack([counts["counts_LVE"].sum(axis=1) for counts in by_domain.values()])
        total = jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *by_domain.values())
        load_GLE = assigned_GLE / np.maximum(assigned_GLE.sum(axis=-1, keepdims=True), 1)
        return total | {"load_GLE": load_GLE}
