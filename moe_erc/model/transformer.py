"""The OLMoE decoder (arXiv 2409.02060): pre-norm blocks of attention and experts, every layer MoE.

    x = embed[tokens];   x += attention(norm(x));   x += moe(norm(x));   logits = norm(x) @ head.T

Blocks are scanned, so parameters and statistics carry a leading layer axis L and one block is compiled.
"""

from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_erc.model.attention import Attention, rms_norm
from moe_erc.moe.layer import MoE
from moe_erc.moe.routing import RoutingStats
from moe_erc.sharding import BATCH


class Output(NamedTuple):
    """Hidden states and the head instead of logits: the loss multiplies them a slice at a time."""

    x_BTD: jax.Array
    head_VD: jax.Array
    routing: RoutingStats  # every leaf with a leading layer axis


class Block(nn.Module):
    """One layer, in the (carry, broadcast) -> (carry, output) form of `nn.scan`."""

    config: Any  # ModelConfig
    mesh: Any = None

    @nn.compact
    def __call__(self, x_BTD, mask_BT):
        def normalize(name, x):
            return rms_norm(x, self.param(name, nn.initializers.ones, x.shape[-1:]), self.config.norm_eps)

        x_BTD += Attention(self.config, name="attention")(normalize("attention_norm", x_BTD))
        y_BTD, stats = MoE(self.config, self.mesh, name="moe")(normalize("moe_norm", x_BTD), mask_BT)
        return x_BTD + y_BTD, stats


class Transformer(nn.Module):
    """tokens_BT, mask_BT -> Output; `mask_BT` says which tokens the routing statistics count."""

    config: Any  # ModelConfig
    mesh: Any = None

    @nn.compact
    def __call__(self, tokens_BT, mask_BT):
        config, init = self.config, self.config.initializer
        embed_VD = self.param("embed", init, (config.vocab_size, config.width))
        head_VD = embed_VD if config.tie_embeddings else self.param("head", init, (config.vocab_size, config.width))
        # Rows are looked up in the whole matrix: in slices of D, XLA would gather the tokens' vectors instead.
        x_BTD = self._place(self._place(embed_VD, P())[tokens_BT].astype(config.dtype), P(BATCH))
        block = nn.remat(Block, prevent_cse=False) if config.remat == "block" else Block
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.layers,
            unroll=config.scan_unroll,
        )
        x_BTD, stats = stack(config, self.mesh, name="layers")(x_BTD, mask_BT)
        final_norm_D = self.param("final_norm", nn.initializers.ones, (config.width,))
        return Output(rms_norm(x_BTD, final_norm_D, config.norm_eps), head_VD, stats)

    def _place(self, array, spec):
        return array if self.mesh is None else jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, spec))
