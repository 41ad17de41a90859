"""Load-balancing loss of the Switch Transformer, normalised as in the code OLMoE was trained with.

    loss = E / (N K) sum_e count_e mean_prob_e
    1 when balanced, E / K when K experts take everything

N K stands for the actual number of assignments. Under top-p, where tokens have different numbers of
experts, the loss is therefore 1 when balanced as well. Counts are integers of unmasked tokens. They
are added over devices and, with scope "step", over the step's earlier micro-batches and this one.
They are divided once, by their total.

mean_prob is the micro-batch's own, and the loss is weighed by the micro-batch's share of the step's
unmasked tokens. So mean_prob adds up to that of the whole batch, under any routing: where the loads
are alike, so is the loss. A step of several micro-batches differs from the whole batch by the loads
alone: the last micro-batch sees all counts, an earlier one those so far.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.checks import among, check_fields
from moe_erc.losses.base import Loss
from moe_erc.numerics import divide

SCOPES = ("micro_batch", "step")


@dataclasses.dataclass(frozen=True)
class LoadBalanceOptions:
    """scope: "micro_batch" counts its own assignments; "step" adds the step's earlier ones."""

    scope: str = among(*SCOPES)

    def __post_init__(self):
        check_fields(self)


def load(assignments_LE: jax.Array) -> jax.Array:
    """Shares of every layer's assignments, float32; zeros for a layer without any."""
    return divide(assignments_LE, jnp.sum(assignments_LE, axis=-1, keepdims=True))


def load_balance(load_LE: jax.Array, probability_LE: jax.Array) -> jax.Array:
    """Mean over layers of E <load, probability>; the gradient reaches the probability alone."""
    experts = load_LE.shape[-1]
    return experts * jnp.mean(jnp.sum(lax.stop_gradient(load_LE) * probability_LE, axis=-1))


def compute(options: LoadBalanceOptions, output, batch, earlier_LE) -> jax.Array:
    """The loss of a micro-batch's routing."""
    assignments_LE = output.routing.assignments_E
    if options.scope == "step" and earlier_LE is not None:
        assignments_LE += earlier_LE
    return load_balance(load(assignments_LE), output.routing.probability_E)


LOSS = Loss(kind="batch", compute=compute, options=LoadBalanceOptions)
