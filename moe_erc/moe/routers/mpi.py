"""Manifold power iteration (MPI, arXiv 2606.12397): the gates turn the router's rows.

    r_e    = router[e] @ w_gate[e] @ w_gate[e].T
    r'_e   = scale / sqrt(E) * r_e / |r_e|
    logits = x @ r'.T

Every forward pass takes one power step towards the top singular direction of each gate. The step is
part of the graph: the gradient reaches router and w_gate, and `router` is not overwritten. At
inference r' is a constant, and the model is an ordinary MoE.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.checks import within
from moe_erc.moe.routers.base import FlexibleTopK, Router
from moe_erc.moe.routers.softmax import LinearRouter
from moe_erc.numerics import unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPI(LinearRouter, FlexibleTopK):
    """Rows turned by the gates. The power step reads parameters alone: no FLOPs are per token."""

    name: ClassVar[str] = "mpi"
    # C' of the paper, whose sweep at E = 256 found 2, 4 and 8 good, and 1 as bad as vanilla.
    scale: float = within(above=0, default=4.0)

    def rows(self, config: Any, parameters: Mapping) -> jax.Array:
        """r', (E, D), of length scale / sqrt(E) each; 0 where the power step gives 0."""
        router_ED = parameters["router"]
        w_gate_EDF = parameters["w_gate"]
        excited_EF = jnp.einsum(
            "ed,edf->ef", router_ED, w_gate_EDF, precision=lax.Precision.HIGHEST
        )
        turned_ED = jnp.einsum(
            "ef,edf->ed", excited_EF, w_gate_EDF, precision=lax.Precision.HIGHEST
        )
        return self.scale / config.experts**0.5 * unit(turned_ED)

    def exports_as(self) -> Router:
        self.check_plain()
        return super().exports_as()

    def describe(self, config: Any) -> str:
        return (
            f"Router: softmax, the top {config.experts_per_token} of {config.experts} experts, "
            "by rows as manifold power iteration (MPI) turned them."
        )
