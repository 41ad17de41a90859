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
import math

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.checks import BadInput
from moe_erc.losses.base import Loss
from moe_erc.numerics import divide

SCOPES = ("micro_batch", "step")


@dataclasses.dataclass(frozen=True)
class LoadBalanceOptions:
    """scope: "micro_batch" counts its own assignments; "step" adds the step's earlier ones."""

    scope: str

    def __post_init__(self):
        if self.scope not in SCOPES:
            raise BadInput(f"scope is {self.scope!r}; use one of {', '.join(SCOPES)}")


def load(assignments_LE: jax.Array) -> jax.Array:
    """Shares of every layer's assignments, float32; zeros for a layer without any."""
    return divide(assignments_LE, jnp.sum(assignments_LE, axis=-1, keepdims=True))


def load_balance(load_LE: jax.Array, probability_LE: jax.Array) -> jax.Array:
    """Mean over layers of E <load, probability>; the gradient reaches the probability alone."""
    experts = load_LE.shape[-1]
    return experts * jnp.mean(jnp.sum(lax.stop_gradient(load_LE) * probability_LE, axis=-1))


def load_measures(load_LE: jax.Array) -> dict[str, jax.Array]:
    """How even the load of every layer is, by name; `load_LE` may be shares or counts.

    max_load is the highest share over the mean share. max_violation (MaxVio, arXiv 2408.15664) is
    what max_load exceeds 1 by. load_entropy is the entropy of the shares over log E: 1 when even
    (and for E = 1), 0 when one expert takes everything. A layer of zeros counts as even.
    """
    load_LE = jnp.asarray(load_LE)
    experts = load_LE.shape[-1]
    # Of counts, the total is an integer: a float32 sum would round from 2^24 on.
    total_L1 = jnp.sum(load_LE, axis=-1, keepdims=True)
    share_LE = jnp.where(total_L1 > 0, divide(load_LE, total_L1), 1 / experts)
    max_load_L = experts * jnp.max(share_LE, axis=-1)
    # 0 log 0 is 0.
    entropy_L = jnp.sum(share_LE * jnp.log(1 / jnp.where(share_LE > 0, share_LE, 1)), axis=-1)
    evenness_L = entropy_L / math.log(experts) if experts > 1 else jnp.ones_like(entropy_L)
    return {
        "router/max_load": max_load_L,
        "router/load_entropy": evenness_L,
        "router/max_violation": max_load_L - 1,
    }


def compute(options: LoadBalanceOptions, output, batch, earlier_LE) -> jax.Array:
    """The loss of a micro-batch's routing."""
    assignments_LE = output.routing.assignments_E
    if options.scope == "step" and earlier_LE is not None:
        assignments_LE += earlier_LE
    return load_balance(load(assignments_LE), output.routing.probability_E)


LOSS = Loss(kind="batch", compute=compute, options=LoadBalanceOptions)
