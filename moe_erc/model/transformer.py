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

# The cache has an axis of layers; all else of a context is the same for every layer.
BY_LAYER = Context(nn.broadcast, nn.broadcast, cache=0, slot=nn.broadcast, segments_BT=nn.broadcast)


class Output(NamedTuple):
    """What the model returns: hidden states and the head instead of logits.

    The loss multiplies the two a slice at a time, so that the logits never exist at once.
    """

    x_BTD: jax.Array
    head_VD: jax.Array
    routing: RoutingStats  # every leaf with a leading layer axis
    observed: dict  # {observer: value, stacked over layers}
    cache: Cache | None = None  # the context's, with these tokens in it


class Block(nn.Module):
    """One layer, in the (carry, broadcast) -> (carry, output) form of `nn.scan`."""

    config: Any  # ModelConfig
    mesh: Any = None
    observers: tuple = ()  # of `MoE`

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, mask_BT: jax.Array, router_state: Mapping, context: Context | None
    ) -> tuple[jax.Array, tuple]:
        def normalize(name, x):
            scale_D = self.param(name, nn.initializers.ones, x.shape[-1:])
            return rms_norm(x, scale_D, self.config.norm_eps)

        attention = Attention(self.config, self.mesh, name="attention")
        y_BTD, cache = attention(normalize("attention_norm", x_BTD), context)
        x_BTD += y_BTD
        moe = MoE(self.config, self.mesh, self.observers, name="moe")
        y_BTD, *observed = moe(normalize("moe_norm", x_BTD), mask_BT, router_state)
        return x_BTD + y_BTD, (*observed, cache)


class Transformer(nn.Module):
    """(tokens_BT, mask_BT, router_state, context) -> Output.

    mask_BT: True for the tokens that the routing statistics count.
    router_state: what a router reads beside its parameters; every leaf has a leading layer axis.
        {"bias": (L, E)} under loss-free balancing, {"competing": (L,)} while experts compete, {}
        for most routers.
    context: where tokens stand and what they attend to; it may bring a cache. Without it every
        token attends to all before it.
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
        if config.tie_embeddings:
            head_VD = embed_VD
        else:
            head_VD = self.param("head", init, (config.vocab_size, config.width))
        # Rows are looked up in the whole matrix: in slices of D, XLA would gather the tokens'
        # vectors instead.
        whole_VD = self._place(embed_VD, P())
        x_BTD = self._place(whole_VD[tokens_BT].astype(config.dtype), P(BATCH))
        block = nn.remat(Block, prevent_cse=False) if config.remat == "block" else Block
        context_axes = None if context is None else BY_LAYER
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, context_axes),
            length=config.layers,
            # Parameters are drawn once; several layers a turn would only lengthen compilation.
            unroll=1 if self.is_initializing() else config.scan_unroll,
            # No output is broadcast, so there is nothing to check by tracing a layer once more.
            check_constancy_invariants=False,
        )
        layers = stack(config, self.mesh, self.observers, name="layers")
        x_BTD, (stats, observed, cache) = layers(x_BTD, mask_BT, router_state, context)
        final_norm_D = self.param("final_norm", nn.initializers.ones, (config.width,))
        x_BTD = rms_norm(x_BTD, final_norm_D, config.norm_eps)
        return Output(x_BTD, head_VD, stats, observed, cache)

    def router_rows(self, params: Mapping) -> jax.Array | None:
        """(L, E, D): for every expert the direction in token space that the router draws to it.

        None where the router has no rows.
        """
        router = self.config.router
        if not router.has_rows:
            return None

        def of_layer(moe):
            return router.rows(self.config, moe)

        return jax.vmap(of_layer)(params["layers"]["moe"])

    def _place(self, array, spec):
        if self.mesh is None:
            return array
        return jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, spec))
