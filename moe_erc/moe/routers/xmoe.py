"""X-MoE (arXiv 2204.09179): tokens and experts are compared by angle, in E / 2 dimensions.

    score_e = cos(x @ projection, expert_embedding[e])
    probs   = softmax(score / temperature),   temperature a learned scalar

The balance loss reads softmax(score / 0.3), whatever the temperature has become. A learned
temperature below 0.01 counts as 0.01. Where a softmax router has E D parameters, this one has
E D / 2 + E^2 / 2 + 1. Fewer than 4 experts are refused: in the one dimension that is left, every
cosine is 1 or -1, and experts tie.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh

from moe_erc.checks import BadInput
from moe_erc.moe.routers.base import FlexibleTopK, Parameter
from moe_erc.moe.routing import Scores
from moe_erc.numerics import unit

TEMPERATURE = 0.3  # the learned one at first, and always that of the balance loss
LOWEST_TEMPERATURE = 0.01  # a learned scalar must not reach 0
FEWEST_EXPERTS = 4  # they make two dimensions


@dataclasses.dataclass(frozen=True, kw_only=True)
class XMoE(FlexibleTopK):
    """Cosines over the temperature."""

    name: ClassVar[str] = "xmoe"
    has_rows: ClassVar[bool] = True

    def check(self, config: Any) -> None:
        if config.experts < FEWEST_EXPERTS:
            raise BadInput(
                f"model.experts: {config.experts}, but router {self.name!r} compares them by angle "
                "in E / 2 dimensions, and in a single one all cosines are 1 or -1 and tie; "
                f"use at least {FEWEST_EXPERTS}"
            )

    def parameters(self, config: Any) -> dict[str, Parameter]:
        """Projection, one embedding per expert, temperature."""
        size = _dimensions(config)
        return {
            "projection": Parameter(config.initializer, (config.width, size)),
            "expert_embedding": Parameter(
                config.initializer, (config.experts, size), orthogonalized=False
            ),
            "temperature": Parameter(nn.initializers.constant(TEMPERATURE), ()),
        }

    def score(
        self, config: Any, mesh: Mesh | None, parameters: Mapping, x_BTD: jax.Array
    ) -> Scores:
        exact = lax.Precision.HIGHEST
        x_BTD = x_BTD.astype(jnp.float32)
        low_BTd = jnp.einsum("bti,id->btd", x_BTD, parameters["projection"], precision=exact)
        embedding_Ed = unit(parameters["expert_embedding"])
        cosine_BTE = jnp.einsum("btd,ed->bte", unit(low_BTd), embedding_Ed, precision=exact)
        logits_BTE = cosine_BTE / jnp.maximum(parameters["temperature"], LOWEST_TEMPERATURE)
        balance_BTE = jax.nn.softmax(cosine_BTE / TEMPERATURE, axis=-1)
        return Scores(logits_BTE, jax.nn.softmax(logits_BTE, axis=-1), balance_BTE)

    def rows(self, config: Any, parameters: Mapping) -> jax.Array:
        """The direction in token space that each embedding stands for, (E, D).

        It is the embedding's unit vector times the projection.
        """
        embedding_Ed = unit(parameters["expert_embedding"])
        return jnp.matmul(embedding_Ed, parameters["projection"].T, precision=lax.Precision.HIGHEST)

    def flops(self, config: Any) -> float:
        """The projection, and E cosines of what it gives."""
        return 2 * _dimensions(config) * (config.width + config.experts)


def _dimensions(config: Any) -> int:
    return config.experts // 2
