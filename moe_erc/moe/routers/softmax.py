"""The router of nearly every MoE: one row an expert, compared with the token by their dot product.

logits = x @ router.T in float32,   probs = softmax(logits)
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.moe.routing import Router, Scores


def declare(config):
    """One row of the model's width for every expert."""
    return {"router": (config.router_initializer, (config.experts, config.width))}


def linear_scores(x_BTD, router_ED):
    """Scores of rows. The choice of experts is discrete: a rounded score is another model; E columns cost nothing."""
    logits_BTE = jnp.einsum("btd,ed->bte", x_BTD.astype(jnp.float32), router_ED, precision=lax.Precision.HIGHEST)
    probabilities_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    return Scores(logits_BTE, probabilities_BTE, probabilities_BTE)


def score(config, mesh, parameters, x_BTD):
    """The rows as they are."""
    return linear_scores(x_BTD, parameters["router"])


def rows(config, parameters):
    """The rows as they are."""
    return parameters["router"]


def work(config):
    """One dot product an expert."""
    return config.experts * config.width


ROUTER = Router(declare, score, work, rows)
