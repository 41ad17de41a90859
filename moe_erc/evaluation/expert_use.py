"""Which experts the tokens of every validation domain meet.

It counts, and computes the measures of `measures/expert_use.py`. A token is counted where the next
one is predicted from it, as in the validation loss. Empty slots and masked tokens are not counted.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_erc.data.text import Corpus, validation_batches
from moe_erc.measures import expert_use
from moe_erc.measures.expert_use import coactivation, domain_divergence, token_specialization
from moe_erc.model.context import of_batch
from moe_erc.model.transformer import Transformer
from moe_erc.sharding import replicate


class ExpertUse:
    """Measures which experts a model uses, on `windows` of each domain, or on all.

    `put` places whole batches on devices.
    """

    def __init__(
        self,
        model: Transformer,
        corpus: Corpus,
        put: Callable,
        shape_BT: tuple[int, int],
        windows: int | None = None,
    ):
        self._windows = windows
        self._corpus = corpus
        self._put = put
        self._shape_BT = shape_BT
        config = model.config

        def experts_BTK(layer):
            return jnp.where(layer.chosen_BTK, layer.routing.experts_BTK, config.experts)

        observed = model.clone(observers=(("experts", experts_BTK, ()),))

        @functools.partial(jax.jit, out_shardings=replicate(model.mesh))
        def count(weights, batch):
            tokens_BT = batch["inputs_BT"]
            context = of_batch(batch)
            output = observed.apply(
                {"params": weights.params}, tokens_BT, batch["mask_BT"], weights.router, context
            )

            def of_layer(experts_BTK):
                # A slot that is not used has an expert beyond the last, which is dropped here.
                zeros_VE = jnp.zeros((config.vocab_size, config.experts), jnp.int32)
                counts_VE = zeros_VE.at[tokens_BT[..., None], experts_BTK].add(1, mode="drop")
                one_hot_BTKE = jax.nn.one_hot(experts_BTK, config.experts, dtype=jnp.int32)
                active_BTE = one_hot_BTKE.sum(axis=-2)
                pairs_EE = jnp.einsum("bte,btf->ef", active_BTE, active_BTE)
                return {"counts_LVE": counts_VE, "pairs_LEE": pairs_EE}

            zeros_V = jnp.zeros(config.vocab_size, jnp.int32)
            occurrences_V = zeros_V.at[tokens_BT].add(batch["mask_BT"])
            by_layer = jax.lax.map(of_layer, output.observed["experts"])
            return by_layer | {"occurrences_V": occurrences_V}

        self._count = count

    def run(self, weights: Any) -> dict[str, np.ndarray]:
        """The measures by key.

        Divergence of domains and specialisation of tokens are (L,), the load by domain is
        (G, L, E), and co-activation is (L, E, E).
        """
        counts = self.count(weights)
        return {
            expert_use.LOAD.key: counts["load_GLE"],
            expert_use.DIVERGENCE.key: domain_divergence(counts["load_GLE"]),
            expert_use.TOKEN_SPECIALIZATION.key: token_specialization(
                counts["counts_LVE"], counts["occurrences_V"]
            ),
            expert_use.COACTIVATION.key: coactivation(counts["pairs_LEE"]),
        }

    def count(self, weights: Any) -> dict[str, np.ndarray]:
        """The counts over all domains, int64, and the load.

        "counts_LVE" counts how often a token id met an expert, "pairs_LEE" the tokens that met both
        experts, and "occurrences_V" how often a token id occurred. "load_GLE" is the share that an
        expert has of the assignments of a domain.
        """
        batch_size, length = self._shape_BT
        by_domain = {}
        for domain in self._corpus.streams["validation"]:
            batches = validation_batches(self._corpus, domain, length, batch_size, self._windows)
            total = None
            for batch in batches:
                counts = jax.device_get(self._count(weights, self._put(batch)))
                # A batch fits int32; the sum over batches may need int64.
                counts = jax.tree.map(np.int64, counts)
                total = counts if total is None else jax.tree.map(np.add, total, counts)
            by_domain[domain] = total
        assigned_GLE = np.stack([counts["counts_LVE"].sum(axis=1) for counts in by_domain.values()])
        total = jax.tree.map(_sum, *by_domain.values())
        load_GLE = assigned_GLE / np.maximum(assigned_GLE.sum(axis=-1, keepdims=True), 1)
        return total | {"load_GLE": load_GLE}


def _sum(*leaves):
    return np.sum(leaves, axis=0)
