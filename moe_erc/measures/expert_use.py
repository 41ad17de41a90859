"""Who uses which experts: domains, token ids, and experts together, from counts of assignments.

    domain divergence     H(mean_g p_g) - mean_g H(p_g), of the shares p_g in domain g: that of
                          Jensen and Shannon
    token specialisation  sum_v max_e N_ve / sum_v N_v: of N_v occurrences of token v, N_ve met e
    co-activation         N_ef / N_e: N_e tokens chose expert e, N_ef of them expert f as well

The last two as in OLMoE (arXiv 2409.02060), with all the experts that a token chose. Plain NumPy,
on the host.
"""

import numpy as np

from moe_erc.measures.base import Measure

# (G, L, E)
LOAD = Measure("use/load", "load by domain", "share of assignments", per_layer=False)
DIVERGENCE = Measure("use/domain_divergence", "divergence of domains", "bits", per_layer=True)
TOKEN_SPECIALIZATION = Measure(
    "use/token_specialization", "token specialisation", "share of occurrences", True
)
# (L, E, E)
COACTIVATION = Measure("use/coactivation", "co-activation", "share of the row's tokens", True)

MEASURES = (LOAD, DIVERGENCE, TOKEN_SPECIALIZATION, COACTIVATION)


def expert_shares(load_GLE: np.ndarray) -> np.ndarray:
    """Counts or shares as distributions over experts; NaN where a layer has no load."""
    load_GLE = np.asarray(load_GLE, np.float64)
    with np.errstate(invalid="ignore"):
        return load_GLE / load_GLE.sum(axis=-1, keepdims=True)


def domain_divergence(load_GLE: np.ndarray) -> np.ndarray:
    """By layer, (L,) bits: 0 if all G domains use the experts alike, log2 G if none share one."""
    share_GLE = expert_shares(load_GLE)
    return _entropy(share_GLE.mean(axis=0)) - _entropy(share_GLE).mean(axis=0)


def token_specialization(counts_LVE: np.ndarray, occurrences_V: np.ndarray) -> np.ndarray:
    """By layer, (L,): the share of a token id's occurrences that its most used expert sees.

    It is the mean over occurrences.
    An occurrence counts at each of its K experts: K / E if use is even, 1 if every id has an expert
    it never misses.
    """
    return np.max(counts_LVE, axis=-1).sum(axis=-1) / np.sum(occurrences_V)


def coactivation(pairs_LEE: np.ndarray) -> np.ndarray:
    """[e, f]: the share of the tokens of expert e that chose f as well, (L, E, E).

    It is 1 on the diagonal, and 0 for an idle expert.
    `pairs_LEE` counts tokens that chose both, and on its diagonal those that chose the expert.
    """
    pairs_LEE = np.asarray(pairs_LEE, np.float64)
    chosen_LE = np.diagonal(pairs_LEE, axis1=1, axis2=2)
    return pairs_LEE / np.maximum(chosen_LE, 1)[..., None]


def _entropy(share):
    """Over the last axis, in bits; 0 log 0 is 0."""
    return np.sum(share * np.log2(1 / np.where(share > 0, share, 1)), axis=-1)
