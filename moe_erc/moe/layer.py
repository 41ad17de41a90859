"""The MoE layer: owns the router and the expert matrices, and calls the functions that use them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from moe_erc.moe import experts, parallel, routing


class MoE(nn.Module):
    """x_BTD -> (y_BTD, RoutingStats). Float32 parameters router (E, D), w_gate and w_up (E, D, F), w_down (E, F, D)."""

    config: Any  # ModelConfig
    mesh: Any = None

    @nn.compact
    def __call__(self, x_BTD, mask_BT):
        config, init = self.config, self.config.initializer
        E, D, F = config.experts, config.width, config.expert_width
        router_ED = self.param("router", init, (E, D))
        expert_weights = experts.ExpertWeights(
            w_gate_EDF=self.param("w_gate", init, (E, D, F)).astype(config.dtype),
            w_up_EDF=self.param("w_up", init, (E, D, F)).astype(config.dtype),
            w_down_EFD=self.param("w_down", init, (E, F, D)).astype(config.dtype),
        )
        # The choice of experts is discrete: a rounded score is another model. E columns cost nothing at full precision.
        scores_BTE = jnp.einsum("btd,ed->bte", x_BTD.astype(jnp.float32), router_ED, precision=lax.Precision.HIGHEST)
        choose = partial(routing.top_k, experts_per_token=config.experts_per_token, renormalize=config.renormalize)
        chosen = parallel.by_token(choose, self.mesh)(scores_BTE)
        platform = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        run = experts.implementation(config.experts_implementation, platform)
        y_BTD = parallel.apply(run, self.mesh, x_BTD, chosen, expert_weights)
        return y_BTD, routing.statistics(scores_BTE, chosen, mask_BT)
