"""The router of DeepSeek-V3 (arXiv 2412.19437): every expert is asked by itself whether it fits.

    logits  = x @ router.T in float32
    s       = sigmoid(logits)
    experts = top K of s + bias
    weight  = scale s_k / (sum of s over the chosen)

The bias is that of loss-free balancing. It turns the choice and not the weights. DeepSeek-V3 scales
by 2.5 and balances with a rate of 1e-3.

A softmax lets an expert gain only what the others lose. A sigmoid does not, so logits may rise
together. What losses and measures read as probabilities is s over its sum over all experts, as in
the balance loss of that paper. Over the chosen experts these shares have the same ratios as s.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from moe_erc.checks import BadInput, within
from moe_erc.moe.routers.base import BiasedTopK, Router
from moe_erc.moe.routers.softmax import LinearRouter, linear_logits
from moe_erc.moe.routing import Routing, Scores, shares


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sigmoid(LinearRouter, BiasedTopK):
    """Sigmoids of dot products, with a bias on the choice."""

    name: ClassVar[str] = "sigmoid"
    renormalize: bool = True
    scale: float = within(above=0, default=1.0)  # of the weights: what those of a token sum to

    @property
    def weight_sum(self) -> float | None:
        return self.scale if self.renormalize else None

    def score(
        self, config: Any, mesh: Mesh | None, parameters: Mapping, x_BTD: jax.Array
    ) -> Scores:
        logits_BTE = linear_logits(x_BTD, self.rows(config, parameters))
        share_BTE = shares(jax.nn.sigmoid(logits_BTE))
        return Scores(logits_BTE, share_BTE, share_BTE)

    def affinity(self, scores: Scores) -> jax.Array:
        return jax.nn.sigmoid(scores.logits_BTE)

    def choose(
        self, config: Any, probabilities_BTE: jax.Array, preference_BTE: jax.Array
    ) -> Routing:
        chosen = super().choose(config, probabilities_BTE, preference_BTE)
        return chosen._replace(weights_BTK=self.scale * chosen.weights_BTK)

    def exports_as(self) -> Router:
        raise BadInput(
            "model.router: 'sigmoid' cannot be exported; an OLMoE weighs experts by a softmax"
        )
