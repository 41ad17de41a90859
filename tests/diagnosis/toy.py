"""Two measures from outside the package: one of every step, and one of a layer at every evaluation."""

import jax.numpy as jnp

from moe_erc.measures.base import Measure


def squared_load(share_LE):
    """E sum_e share_e^2: 1 when balanced, E when one expert takes everything."""
    return share_LE.shape[-1] * jnp.sum(jnp.square(share_LE), axis=-1)


def tokens(layer):
    """How many tokens the layer saw."""
    return jnp.sum(layer.mask_BT)


TOYS = (
    Measure("router/toy_load", "toy load", "of toys", True, squared_load, "lower", "load"),
    Measure("experts/toy_tokens", "toy tokens", "of toys", True, tokens, "higher", "layer", digits=0),
)
