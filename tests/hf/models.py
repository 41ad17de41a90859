"""Small models with parameters as large as after training, and what they compute."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_erc import sharding
from moe_erc.model.transformer import Transformer
from moe_erc.training.state import abstract_state, init_weights


def abstract(model):
    """The abstract parameters, with their shardings."""
    return abstract_state(lambda: init_weights(model, jax.random.key(0)), model).params


def trained(config, mesh=(2, 1)):
    """(model, params), with parameters as large as after training."""
    model = Transformer(config, sharding.make_mesh(*mesh))
    rng = np.random.default_rng(0)

    def draw(leaf):
        numbers = rng.normal(leaf.ndim < 3, 0.3, leaf.shape).astype(np.float32)
        return jax.device_put(numbers, leaf.sharding)

    return model, jax.tree.map(draw, abstract(model))


def logits(model, params, ids_BT):
    """(B, T, V), with every token counted."""

    @jax.jit
    def run(params):
        router = model.config.router.init_state(model.config).by_layer
        every_BT = jnp.ones_like(ids_BT, bool)
        output = model.apply({"params": params}, ids_BT, every_BT, router)
        return output.x_BTD @ output.head_VD.T

    return run(params)
