"""X-MoE (arXiv 2204.09179): tokens and experts compared by angle, in a space of E / 2 dimensions.

    score_e = cos(x @ projection, expert_embedding[e]),   probs = softmax(score / temperature), a learned scalar

Both sides are normalised. The balance loss reads softmax(score / 0.3), whatever the temperature has become; a learned
temperature below 0.01 counts as 0.01. Where a softmax router has E D parameters, this one has E D / 2 + E^2 / 2 + 1.
Fewer than 4 experts are refused: in the one dimension that is left, every cosine is 1 or -1, and experts tie.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from moe_erc.moe.routing import Router, Scores
from moe_erc.numerics import unit

TEMPERATURE = 0.3  # at first, and of the balance loss
LOWEST_TEMPERATURE = 0.01  # a learned scalar must not reach 0
FEWEST_EXPERTS = 4  # which make two dimensions


def declare(config):
    """Projection, one embedding an expert, temperature."""
    size = _size(config)
    return {
        "projection": (config.initializer, (config.width, size)),
        "expert_embedding": (config.initializer, (config.experts, size)),
        "temperature": (nn.initializers.constant(TEMPERATURE), ()),
    }


def score(config, mesh, parameters, x_BTD):
    """Cosines over the temperature."""
    exact = {"precision": lax.Precision.HIGHEST}
    low_BTd = jnp.einsum("bti,id->btd", x_BTD.astype(jnp.float32), parameters["projection"], **exact)
    cosine_BTE = jnp.einsum("btd,ed->bte", unit(low_BTd), unit(parameters["expert_embedding"]), **exact)
    logits_BTE = cosine_BTE / jnp.maximum(parameters["temperature"], LOWEST_TEMPERATURE)
    return Scores(logits_BTE, jax.nn.softmax(logits_BTE, axis=-1), jax.nn.softmax(cosine_BTE / TEMPERATURE, axis=-1))


def rows(config, parameters):
    """The direction in token space that each embedding stands for: its normalised self times the projection."""
    embedding_Ed, projection_Dd = unit(parameters["expert_embedding"]), parameters["projection"]
    return jnp.matmul(embedding_Ed, projection_Dd.T, precision=lax.Precision.HIGHEST)


def work(config):
    """The projection, and E cosines of what it gives."""
    return _size(config) * (config.width + config.experts)


def _size(config):
    return config.experts // 2


ROUTER = Router(declare, score, work, rows)
