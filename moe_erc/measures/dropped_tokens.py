"""Tokens that meet no expert: a token may pass the threshold of none, where experts have them."""

import jax
import jax.numpy as jnp

from moe_erc.measures.base import Measure
from moe_erc.numerics import masked_mean


def dropped_tokens(layer) -> jax.Array:
    """Share of the unmasked tokens of one layer without any expert; 0 without a token."""
    return masked_mean(~jnp.any(layer.chosen_BTK, axis=-1), layer.mask_BT)


def may_drop(config) -> bool:
    """Whether a token may be left without an expert; the highest probabilities leave none so."""
    return not config.router.has_probabilities


DROPPED_TOKENS = Measure(
    "router/dropped_tokens", "dropped tokens", "share of tokens", True, dropped_tokens, "lower",
    reads="layer", applies=may_drop,
)  # fmt: skip
