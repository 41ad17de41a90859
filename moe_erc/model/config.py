"""The model's sizes and method, frozen, with exact counts of parameters and FLOPs.

What cannot be built is refused (`check.py`) before anything is compiled.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax

from moe_erc.checks import BadInput, among, within
from moe_erc.model.check import check_sizes
from moe_erc.moe.experts import FACTORIZED, GATED
from moe_erc.moe.layer import declare
from moe_erc.moe.routers import make_router
from moe_erc.moe.routers.base import Router

MOST_ASSIGNMENTS = 2**31 - 1  # of a layer in a step: what an int32 counts


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Every field is explained in `configs/base.py`, where the values come from."""

    vocab_size: int = within(least=1)
    layers: int = within(least=1)
    width: int = within(least=1)
    heads: int = within(least=1)
    kv_heads: int = within(least=1)
    experts: int = within(least=1)
    experts_per_token: int = within(least=1)
    expert_width: int = within(least=1)
    router: Router  # with its options, the block `routers` of the configuration
    forced_balance: bool  # tokens are routed evenly, whatever the router says
    shared_experts: int = within(least=0)
    rope_theta: float = within(above=0)
    norm_eps: float = within(above=0)
    clip_qkv: float = within(least=0, note="0 clips nothing")
    init_std: float = within(above=0)
    tie_embeddings: bool
    dtype: str = among("float32", "bfloat16")
    remat: str = among("none", "block")
    scan_unroll: int = within(least=1)
    attention_implementation: str = among("auto", "xla", "cudnn", "splash")
    experts_implementation: str = among(
        "auto", "dense", "block_loop", "ragged", "megablox", "pallas", "tokamax"
    )

    def __post_init__(self):
        check_sizes(self)
        self.router.check(self)

    @classmethod
    def of(cls, config: Mapping) -> "ModelConfig":
        """The model that the blocks `model` and `routers` of a configuration describe.

        BadInput if it cannot be built.
        """
        model = dict(config["model"])
        routers = dict(config["routers"])
        model["forced_balance"] = routers.pop("forced_balance")
        model["router"] = make_router(model["router"], routers)
        return cls(**model)

    def check_vocabulary(self, tokens: int) -> None:
        """Refuses a tokenizer with more tokens than the embedding has rows."""
        if tokens > self.vocab_size:
            raise BadInput(
                f"model.vocab_size: {self.vocab_size} rows are too few for the tokenizer's "
                f"{tokens} tokens"
            )

    def check_assignments(self, batch_size: int, length: int) -> None:
        """Refuses a step with more assignments per layer than an int32 counts."""
        most = self.router.most_experts(self)
        assignments = batch_size * length * most
        if assignments > MOST_ASSIGNMENTS:
            raise BadInput(
                f"train.batch_size: {batch_size} sequences of {length} tokens with {most} experts "
                f"each are {assignments:,} assignments a layer, more than the "
                f"{MOST_ASSIGNMENTS:,} that are counted; "
                f"use at most {MOST_ASSIGNMENTS // (length * most)}"
            )

    @property
    def initializer(self) -> jax.nn.initializers.Initializer:
        """What draws every matrix: a truncated normal, cut at three sigma."""
        return jax.nn.initializers.truncated_normal(self.init_std, lower=-3.0, upper=3.0)

    @property
    def head_width(self) -> int:
        """The width of one head."""
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        """The width of all key heads together, and of all value heads."""
        return self.kv_heads * self.head_width

    def parameters(self, experts: int | None = None) -> int:
        """Exact number of parameters; with `experts` experts a layer instead of all of them."""
        projections = 2 * self.width * self.width + 2 * self.width * self.kv_width
        query_and_key_norms = self.width + self.kv_width
        moe = 0
        for name, parameter in declare(self).items():
            size = math.prod(parameter.shape)
            if experts and name in (*GATED, *FACTORIZED):
                size = size * experts // self.experts
            moe += size
        block_norms = 2 * self.width
        layer = projections + query_and_key_norms + moe + block_norms
        embeddings = self.vocab_size * self.width * (1 if self.tie_embeddings else 2)
        final_norm = self.width
        return embeddings + self.layers * layer + final_norm

    def active_parameters(self) -> int:
        """The number of parameters that a token meets: all but the experts it is not routed to."""
        return self.parameters(self.experts_per_token)

    def flops_per_token(self, length: int) -> float:
        """FLOPs of a token's forward pass: twice its multiply-adds.

        Matmuls are counted, and causal attention over `length` tokens.
        """
        attention = (
            2 * self.width * self.width
            + 2 * self.width * self.kv_width
            + 2 * self.width * (length + 1) / 2
        )
        # Of a factorised gate the router computes the first factor, and counts it.
        gate = (self.router.gate_rank(self) or self.width) * self.expert_width
        expert = gate + 2 * self.width * self.expert_width
        shared = 3 * self.shared_experts * self.width * self.expert_width
        layer = 2 * (attention + self.experts_per_token * expert + shared) + self.router.flops(self)
        return self.layers * layer + 2 * self.vocab_size * self.width
