"""Router z-loss (ST-MoE, arXiv 2202.08906): it keeps router logits small, where softmax is exact.

loss = mean_N logsumexp(logits_NE)^2
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_erc.losses.base import Loss, Needs, NoOptions


def router_z(logsumexp2_L: jax.Array) -> jax.Array:
    """Mean over layers of the mean squared logsumexp, which each layer reduces to a scalar."""
    return jnp.mean(logsumexp2_L)


def compute(
    options: NoOptions, output: Any, batch: Mapping, earlier_LE: jax.Array | None
) -> jax.Array:
    """The loss of a micro-batch's logits."""
    return router_z(output.routing.logsumexp2)


LOSS = Loss(
    kind="batch",
    compute=compute,
    needs=Needs("has_probabilities", "reads the logits of probabilities"),
)
