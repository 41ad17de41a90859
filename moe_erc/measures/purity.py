"""Purity of routing: how much the chosen expert tells of the domain of a token.

    purity = 2 I(expert; domain) / (H(expert) + H(domain))

It is the normalised mutual information of two draws: an assignment of a token, and the token's
domain. It is 0 where all domains use the experts alike, and 1 where expert and domain determine
each other. Every domain weighs as much as every other one. Plain NumPy, on the host.
"""

import numpy as np

from moe_erc.measures.base import Measure

PURITY = Measure(
    "router/purity", "purity of routing", "normalised information", per_layer=True, better="higher"
)


def purity(assignments_GLE: np.ndarray) -> np.ndarray:
    """By layer, (L,) float64, from counts of assignments by domain, layer and expert.

    0 for a layer in which all assignments go to one expert, and for a single domain. A domain
    without assignments in a layer does not count there.
    """
    counts_GLE = np.asarray(assignments_GLE, np.float64)
    total_GL1 = counts_GLE.sum(axis=-1, keepdims=True)
    used_GL1 = total_GL1 > 0
    domains_L1 = np.maximum(used_GL1.sum(axis=0), 1)
    joint_GLE = counts_GLE / np.where(used_GL1, total_GL1, 1) / domains_L1
    expert_L = _entropy(joint_GLE.sum(axis=0), -1)
    domain_L = np.log(domains_L1[..., 0])
    information_L = expert_L + domain_L - _entropy(joint_GLE, (0, 2))
    possible_L = expert_L + domain_L
    has_information_L = (expert_L > 0) & (domain_L > 0)
    share_L = 2 * information_L / np.where(has_information_L, possible_L, 1)
    return np.where(has_information_L, np.clip(share_L, 0, 1), 0)


def _entropy(share, axes):
    """In nats; 0 log 0 is 0."""
    surprise = np.log(1 / np.where(share > 0, share, 1))
    return np.sum(share * surprise, axis=axes)
