"""Tokens that meet no expert: a token may pass the threshold of none, where experts have them."""

import jax
import jax.numpy as jnp

from moe_erc.measures.base import Measure


def dropped_tokens(layer) -> jax.Array:
    """Share of the unmasked tokens of one layer without any expert; 0 without a token."""
    dropped_BT = layer.mask_BT & ~jnp.any(layer.chosen_BTK, axis=-1)
    return jnp.sum(dropped_BT) / jnp.maximum(jnp.sum(layer.mask_BT), 1)


def may_drop(config) -> bool:
    """Whether a token may be left without an expert; the highest probabilities leave none so."""
    return not config.has_probabilities


DROPPED_TOKENS = Measure(
    "router/dropped_tokens", "dropped tokens", "share of tokens", True, dropped_tokens, "lower",
    reads="layer", applies=may_drop,
)  # fmt: skip
