"""The router of nearly every MoE: the dot product of the token with one row per expert.

logits = x @ router.T in float32
probs  = softmax(logits)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_erc.checks import among
from moe_erc.moe.routers.base import FlexibleTopK, Parameter, Router, TopK
from moe_erc.moe.routing import Scores
from moe_erc.sharding import DATA

INITIALIZERS = ("normal", "orthogonal")


def linear_logits(x_BTD: jax.Array, router_ED: jax.Array) -> jax.Array:
    """The dot product of every token with every row, in full float32.

    The choice is discrete: a rounded score gives another model, and E columns take little time.
    """
    return jnp.einsum(
        "btd,ed->bte", x_BTD.astype(jnp.float32), router_ED, precision=lax.Precision.HIGHEST
    )


def linear_scores(x_BTD: jax.Array, router_ED: jax.Array) -> Scores:
    """The scores of rows."""
    logits_BTE = linear_logits(x_BTD, router_ED)
    probabilities_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    return Scores(logits_BTE, probabilities_BTE, probabilities_BTE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRouter(TopK):
    """A router whose parameter is one row of the model's width per expert, `router` (E, D)."""

    has_rows: ClassVar[bool] = True
    is_linear: ClassVar[bool] = True
    # How rows are drawn: "normal", as other matrices are, or "orthogonal", orthonormal.
    init: str = among(*INITIALIZERS, default="normal")

    def parameters(self, config: Any) -> dict[str, Parameter]:
        initializer = config.initializer
        if self.init == "orthogonal":
            initializer = nn.initializers.orthogonal()
        shape = (config.experts, config.width)
        # Every device reads the whole router. Moments are read only where they are updated, so they
        # are split.
        router = Parameter(initializer, shape, moments=P(None, DATA), orthogonalized=False)
        return {"router": router}

    def score(
        self, config: Any, mesh: Mesh | None, parameters: Mapping, x_BTD: jax.Array
    ) -> Scores:
        return linear_scores(x_BTD, self.rows(config, parameters))

    def rows(self, config: Any, parameters: Mapping) -> jax.Array:
        return parameters["router"]

    def flops(self, config: Any) -> float:
        """One dot product per expert."""
        return 2 * config.experts * config.width

    def exports_as(self) -> Router:
        return Softmax(renormalize=self.renormalize)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softmax(LinearRouter, FlexibleTopK):
    """The router of an ordinary MoE: the rows as they are."""

    name: ClassVar[str] = "softmax"
    is_softmax: ClassVar[bool] = True

    def exports_as(self) -> Router:
        self.check_plain()
        return super().exports_as()
