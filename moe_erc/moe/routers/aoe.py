"""Autonomy-of-Experts (AoE, arXiv 2501.13074): no router, a token meets the experts that it excites most.

    w_gate[e] = w_low[e] @ w_high[e],   low_e = x @ w_low[e],   probs = softmax(|low_e|) over all E

Every expert computes its `low` for every token, 2 N (E - K) D r FLOPs more than it uses, and the chosen go on from it.
With r = D F / (D + F) an expert has as many parameters as one with a full gate.
"""

import jax
import jax.numpy as jnp

from moe_erc.moe import parallel
from moe_erc.moe.routing import Router, Scores
from moe_erc.numerics import square_root


def declare(config):
    """The first factor of every gate; `w_high` is the experts'."""
    return {"w_low": (config.initializer, (config.experts, config.width, config.gate_rank))}


def low_and_length(config, mesh, parameters, x_BTD):
    """(low_BTEr in the dtype of x, its lengths (B, T, E) in float32)."""
    low_BTEr = parallel.project(mesh, x_BTD, parameters["w_low"].astype(config.dtype))
    square_BTE = jnp.sum(jnp.square(low_BTEr), axis=-1)
    return low_BTEr.astype(config.dtype), square_root(square_BTE)


def score(config, mesh, parameters, x_BTD):
    """Softmax of the lengths."""
    low_BTEr, length_BTE = low_and_length(config, mesh, parameters, x_BTD)
    probabilities_BTE = jax.nn.softmax(length_BTE, axis=-1)
    return Scores(length_BTE, probabilities_BTE, probabilities_BTE, low_BTEr)


def work(config):
    """The first factor of all experts."""
    return config.experts * config.width * config.gate_rank


ROUTER = Router(declare, score, work, rows=None)
