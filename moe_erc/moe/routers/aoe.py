"""Autonomy-of-Experts (AoE, arXiv 2501.13074): a token meets the experts that it excites most.

    w_gate[e] = w_low[e] @ w_high[e]
    low_e     = x @ w_low[e]
    probs     = softmax(|low_e|) over all E

There is no router. Every expert computes its `low` for every token, and the chosen experts go on
from it. That takes 2 N (E - K) D r FLOPs more than the chosen experts need. With r = D F / (D + F)
an expert has as many parameters as one with a whole gate.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_erc.checks import within
from moe_erc.moe import parallel
from moe_erc.moe.routers.base import FlexibleTopK, Parameter, Router
from moe_erc.moe.routing import Scores
from moe_erc.numerics import square_root
from moe_erc.sharding import DATA, EXPERT

BY_EXPERT = P(EXPERT, DATA, None)  # the place of w_low: where its expert's other matrices are


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factorized(Router):
    """A router that is the first factor of the gates, `w_low` (E, D, r).

    The second factor, `w_high` (E, r, F), is a parameter of the experts.
    """

    rank: int = within(least=0, note="0 takes D F / (D + F)", default=0)

    def gate_rank(self, config: Any) -> int:
        """The rank r of the gates.

        Where `rank` is 0, it is the largest with which an expert has no more parameters than with a
        whole gate.
        """
        if self.rank:
            return self.rank
        equal = config.width * config.expert_width // (config.width + config.expert_width)
        return max(equal, 1)

    def parameters(self, config: Any) -> dict[str, Parameter]:
        shape = (config.experts, config.width, self.gate_rank(config))
        return {"w_low": Parameter(config.initializer, shape, BY_EXPERT)}

    def low_and_length(
        self, config: Any, mesh: Mesh | None, parameters: Mapping, x_BTD: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(low_BTEr in the dtype of x, its lengths (B, T, E) in float32)."""
        low_BTEr = parallel.project(
            mesh, x_BTD, parameters["w_low"].astype(config.dtype), BY_EXPERT
        )
        square_BTE = jnp.sum(jnp.square(low_BTEr), axis=-1)
        return low_BTEr.astype(config.dtype), square_root(square_BTE)

    def flops(self, config: Any) -> float:
        """The first factor of all experts."""
        return 2 * config.experts * config.width * self.gate_rank(config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AoE(Factorized, FlexibleTopK):
    """Softmax of the lengths. `renormalize` gives the weights of the paper's Algorithm 2."""

    name: ClassVar[str] = "aoe"

    def score(
        self, config: Any, mesh: Mesh | None, parameters: Mapping, x_BTD: jax.Array
    ) -> Scores:
        low_BTEr, length_BTE = self.low_and_length(config, mesh, parameters, x_BTD)
        probabilities_BTE = jax.nn.softmax(length_BTE, axis=-1)
        return Scores(length_BTE, probabilities_BTE, probabilities_BTE, low_BTEr)
