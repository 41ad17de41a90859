"""What routing carries from step to step beside its parameters: explicit, in `TrainState`, saved and restored.

    router        {"bias": (L, E)} where balancing is loss-free (arXiv 2408.15664), else {}
    loss_scales   {"load_balance": scalar} where a controller holds the density (arXiv 2604.00801), else {}

In which layers experts compete (CompeteSMoE, arXiv 2505.13380) is drawn from the step's key: a function of the state.
"""

import jax
import jax.numpy as jnp

from moe_erc.losses.loss_free import balance_bias


def initial(config):
    """(router, loss_scales) of step 0."""
    router = {"bias": jnp.zeros((config.layers, config.experts))} if config.bias_rate else {}
    return router, {"load_balance": jnp.float32(1)} if config.router == "routing_free" else {}


def for_step(config, router, rng):
    """What the model reads on a training step; at inference it is `router` alone."""
    return router | {"competing": competing_layers(config, rng)} if config.competes else router


def competing_layers(config, rng):
    """(L,) bool: every layer with the same probability, but no more than `competition_layers` of them."""
    draw_L = jax.random.uniform(rng, (config.layers,))
    rank_L = jnp.argsort(jnp.argsort(draw_L))
    return (draw_L < config.competition_rate) & (rank_L < config.competition_layers)


def after_step(config, router, loss_scales, load_LE, active_L):
    """(router, loss_scales) for the next step, from the whole step's routing.

    More experts a token than K: the balance loss weighs more; fewer: less.
    """
    if config.bias_rate:
        router = {"bias": balance_bias(router["bias"], load_LE, config.bias_rate)}
    if loss_scales:
        direction = jnp.sign(jnp.mean(active_L) - config.experts_per_token)
        loss_scales = {"load_balance": loss_scales["load_balance"] * (1 + config.controller_rate) ** direction}
    return router, loss_scales
