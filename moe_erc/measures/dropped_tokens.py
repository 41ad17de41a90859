"""Tokens that meet no expert. Where experts have thresholds, a token may pass none of them."""

from typing import Any

import jax
import jax.numpy as jnp

from moe_erc.measures.base import Measure
from moe_erc.numerics import masked_mean


def dropped_tokens(layer: Any) -> jax.Array:
    """Share of the unmasked tokens of one layer without any expert; 0 without a token."""
    return masked_mean(~jnp.any(layer.chosen_BTK, axis=-1), layer.mask_BT)


def may_drop(config: Any) -> bool:
    """Whether a token may be left without an expert.

    A router with probabilities always takes the most probable ones.
    """
    return not config.router.has_probabilities


DROPPED_TOKENS = Measure(
    "router/dropped_tokens",
    "dropped tokens",
    "share of tokens",
    per_layer=True,
    compute=dropped_tokens,
    better="lower",
    reads="layer",
    applies=may_drop,
)
