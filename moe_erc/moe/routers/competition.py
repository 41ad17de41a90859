"""CompeteSMoE (v2, arXiv 2505.13380): now and then all experts run, and the router learns who would have won.

    a_e = mean softplus(expert_e(x)),   q = softmax(a),   experts = top K of q,   weights = a[experts] / sum

On other steps the router is a softmax router. `losses/competition.py` draws it towards q; in which layers experts
compete is drawn step by step (`router_state.py`), and of more than the allowed number the excess does not. In a layer
that competes the balance loss reads q, as the tokens were routed by it. Dense while it lasts: the price is the point of
the comparison.
"""

import dataclasses
import math

import jax
from jax import lax

from moe_erc.moe.routers import softmax
from moe_erc.moe.routing import Routing, shares


def winners(affinity_BTE, experts_per_token):
    """(Routing to the experts that answer most, q) of all experts' affinities."""
    weights_BTK, experts_BTK = lax.top_k(affinity_BTE, experts_per_token)
    return Routing(shares(weights_BTK), experts_BTK), jax.nn.softmax(affinity_BTE, axis=-1)


def expected_share(config):
    """Of the layers that compete on a step: each with the same probability, but not more than so many."""
    layers, rate = config.layers, config.competition_rate
    ways = (math.comb(layers, count) * rate**count * (1 - rate) ** (layers - count) for count in range(layers + 1))
    return sum(min(count, config.competition_layers) * way for count, way in enumerate(ways)) / layers


def work(config):
    """A softmax router's, and now and then all experts."""
    return softmax.work(config) + expected_share(config) * 3 * config.experts * config.width * config.expert_width


ROUTER = dataclasses.replace(softmax.ROUTER, work=work)
