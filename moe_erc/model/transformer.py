"""The OLMoE decoder (arXiv 2409.02060): pre-norm blocks of attention and experts, every layer MoE.

    x = embed[tokens];   x += attention(norm(x));   x += moe(norm(x));   logits = norm(x) @ head.T

Blocks are scanned, so parameters and statistics carry a leading layer axis L and one block is
compiled.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_erc.model.attention import Attention, rms_norm
from moe_erc.model.context import Cache, Context
from moe_erc.moe.layer import MoE
from moe_erc.moe.routing import RoutingStats
from moe_erc.sharding import BATCH

# What of a context is every layer's, and what has an axis of layers.
BY_LAYER = Context(nn.broadcast, nn.broadcast, cache=0, slot=nn.broadcast, segments_BT=nn.broadcast)


class Output(NamedTuple):
    """Hidden states and the head instead of logits: the loss multiplies them a slice at a time."""

    x_BTD: jax.Array
    head_VD: jax.Array
    routing: RoutingStats  # every leaf with a leading layer axis
    observed: dict  # by observer, stacked over layers
    cache: Cache | None = None  # that of the context, with these tokens in it


class Block(nn.Module):
    """One layer, in the (carry, broadcast) -> (carry, output) form of `nn.scan`."""

    config: Any  # ModelConfig
    mesh: Any = None
    observers: tuple = ()  # of `MoE`

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, mask_BT: jax.Array, router_state: Mapping, context: Context | None
    ):
        def normalize(name, x):
            return rms_norm(
                x, self.param(name, nn.initializers.ones, x.shape[-1:]), self.config.norm_eps
            )

        attention = Attention(self.config, name="attention")
        y_BTD, cache = attention(normalize("attention_norm", x_BTD), context)
        x_BTD += y_BTD
        moe = MoE(self.config, self.mesh, self.observers, name="moe")
        y_BTD, *observed = moe(normalize("moe_norm", x_BTD), mask_BT, router_state)
        return x_BTD + y_BTD, (*observed, cache)


class Transformer(nn.Module):
    """tokens_BT, mask_BT, router_state -> Output; `mask_BT` says which tokens the routing statistics count.

    `router_state` is what a router reads beside its parameters, every leaf with a leading layer
    axis: {"bias": (L, E)} of loss-free balancing; {"competing": (L,)} while experts compete; {} for
    most. A `context` says where tokens stand and what they attend to, and may bring a cache;
    without it they attend to all before them.
    """

    config: Any  # ModelConfig
    mesh: Any = None
    observers: tuple = ()  # of `MoE`

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        mask_BT: jax.Array,
        router_state: Mapping,
        context: Context | None = None,
    ) -> Output:
        config = self.config
        init = self.config.initializer
        embed_VD = self.param("embed", init, (config.vocab_size, config.width))
        head_VD = (
            embed_VD
            if config.tie_embeddings
            else self.param("head", init, (config.vocab_size, config.width))
        )
        # Rows are looked up in the whole matrix: in slices of D, XLA would gather the tokens'
        # vectors instead.
        x_BTD = self._place(self._place(embed_VD, P())[tokens_BT].astype(config.dtype), P(BATCH))
        block = nn.remat(Block, prevent_cse=False) if config.remat == "block" else Block
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, context and BY_LAYER),
            length=config.layers,
            unroll=1 if self.is_initializing() else config.scan_unroll,
        )
        layers = stack(config, self.mesh, self.observers, name="layers")
        x_BTD, (stats, observed, cache) = layers(x_BTD, mask_BT, router_state, context)
        final_norm_D = self.param("final_norm", nn.initializers.ones, (config.width,))
        return Output(
            rms_norm(x_BTD, final_norm_D, config.norm_eps), head_VD, stats, observed, cache
        )

    def router_rows(self, params: Mapping) -> jax.Array | None:
        """(L, E, D): for every expert the direction in token space that its router attracts.

        None: it has no rows.
        """
        router = self.config.router
        if not router.has_rows:
            return None
        return jax.vmap(lambda moe: router.rows(self.config, moe))(params["layers"]["moe"])

    def _place(self, array, spec):
        return (
            array
            if self.mesh is None
            else jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, spec))
        )
