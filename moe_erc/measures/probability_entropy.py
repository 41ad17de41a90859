"""Entropy of a token's router probabilities: 0 when one expert is certain, 1 when all are alike."""

import math

import jax

from moe_erc.losses.routing_entropy import routing_entropy
from moe_erc.measures.base import Measure


def probability_entropy(layer) -> jax.Array:
    """Share of log E, mean over the unmasked tokens of one layer; 0 for E = 1."""
    probabilities_BTE = layer.scores.probabilities_BTE
    experts = probabilities_BTE.shape[-1]
    most = math.log(experts) if experts > 1 else 1.0
    return routing_entropy(probabilities_BTE, layer.mask_BT) / most


def has_probabilities(config) -> bool:
    """Whether the router makes probabilities of its scores."""
    return config.router.has_probabilities


PROBABILITY_ENTROPY = Measure(
    "router/probability_entropy", "router entropy", "share of log E", True, probability_entropy,
    reads="layer", applies=has_probabilities,
)  # fmt: skip
