"""What routing carries from step to step beside its parameters: explicit, in `TrainState`, saved and restored.

    router        {"bias": (L, E)} where balancing is loss-free (arXiv 2408.15664), else {}
    loss_scales   {"load_balance": scalar} where a controller holds the density (arXiv 2604.00801), else {}

Both are moved by the step's counts, integers that are added over micro-batches and devices: whether an expert is at the
mean, or a model at its density, is no matter of rounding. In which layers experts compete (CompeteSMoE, arXiv
2505.13380) is drawn from the step's key: a function of the state.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_erc.checks import BadInput
from moe_erc.losses.loss_free import balance_bias
from moe_erc.numerics import divide

MOST = 2**31 - 1  # assignments of a layer that an int32 counts
LOW_BITS = 15  # of the halves in which numbers are added that an int32 does not hold the sum of


class StepCounts(NamedTuple):
    """Where the unmasked tokens of a step went, int32; those of micro-batches add up."""

    assignments_LE: jax.Array
    tokens: jax.Array

    @property
    def experts_per_token_L(self) -> jax.Array:
        """Mean number of experts of a token, float32."""
        return divide(jnp.sum(self.assignments_LE, axis=-1), self.tokens)


def check_counts(config: Any, batch_size: int, length: int) -> None:
    """Refuses a step of more assignments than are counted; `config` is the model's."""
    most = config.experts_per_token if config.has_probabilities else config.experts
    assignments = batch_size * length * most
    if assignments > MOST:
        raise BadInput(
            f"train.batch_size: {batch_size} sequences of {length} tokens with {most} experts each are {assignments:,} "
            f"assignments a layer, more than the {MOST:,} that are counted; use at most {MOST // (length * most)}"
        )


def initial(config):
    """(router, loss_scales) of step 0."""
    router = {"bias": jnp.zeros((config.layers, config.experts))} if config.bias_rate else {}
    return router, {"load_balance": jnp.float32(1)} if config.router == "routing_free" else {}


def for_step(config, router, rng):
    """What the model reads on a training step; at inference it is `router` alone."""
    return router | {"competing": competing_layers(config, rng)} if config.competes else router


def competing_layers(config, rng):
    """(L,) bool: every layer with the same probability, but no more than `competition_layers` of them.

    Of more, the excess is dropped: those of the highest draws, which is any of them alike.
    """
    draw_L = jax.random.uniform(rng, (config.layers,))
    rank_L = jnp.argsort(jnp.argsort(draw_L))
    return (draw_L < config.competition_rate) & (rank_L < config.competition_layers)


def after_step(config, router, loss_scales, counts: StepCounts):
    """(router, loss_scales) for the next step, from the whole step's routing.

    More experts a token than K: the balance loss weighs more; fewer: less; K exactly: as much.
    """
    if config.bias_rate:
        router = {"bias": balance_bias(router["bias"], counts.assignments_LE, config.bias_rate)}
    if loss_scales:
        excess_L = jnp.sum(counts.assignments_LE, axis=-1) - config.experts_per_token * counts.tokens
        direction = sign_of_sum(excess_L)
        loss_scales = {"load_balance": loss_scales["load_balance"] * (1 + config.controller_rate) ** direction}
    return router, loss_scales


def sign_of_sum(numbers_L: jax.Array) -> jax.Array:
    """Of int32 numbers, exactly, whatever their sum: -1, 0 or 1.

    High and low bits are added apart, for the sum over layers of a pod's batch is more than an int32 holds.
    """
    low = jnp.sum(numbers_L & (2**LOW_BITS - 1))
    high = jnp.sum(numbers_L >> LOW_BITS) + (low >> LOW_BITS)
    rest = low & (2**LOW_BITS - 1)
    return jnp.where(high == 0, jnp.sign(rest), jnp.sign(high))
