"""The model's sizes and method, frozen, with exact counts of parameters and FLOPs.

What cannot be built is refused (`check.py`) before anything is compiled.
"""

import dataclasses
import math

import jax

from moe_erc.checks import BadInput, among, within
from moe_erc.model.check import check_routing, check_sizes
from moe_erc.moe.experts import FACTORIZED, GATED
from moe_erc.moe.layer import declare
from moe_erc.moe.routers import ROUTERS
from moe_erc.moe.routing import top


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
    router: str = among(*ROUTERS)
    router_init: str = among("normal", "orthogonal")
    renormalize: bool
    top_p: float = within(above=0, most=1, note="1 keeps all K")
    bias_rate: float = within(least=0)
    shared_experts: int = within(least=0)
    gate_rank: int = within(least=0)
    mpi_scale: float = within(above=0)
    competition_rate: float = within(0, 1)
    competition_layers: int = within(least=1)
    theta: float = within(above=0)
    controller_rate: float = within(least=0)
    rope_theta: float = within(above=0)
    norm_eps: float = within(above=0)
    clip_qkv: float = within(least=0, note="0 clips nothing")
    init_std: float = within(above=0)
    tie_embeddings: bool
    dtype: str = among("float32", "bfloat16")
    remat: str = among("none", "block")
    scan_unroll: int = within(least=1)
    attention_implementation: str = among("auto", "xla", "cudnn")
    experts_implementation: str = among(
        "auto", "dense", "block_loop", "ragged", "pallas", "tokamax"
    )

    def __post_init__(self):
        check_sizes(self)
        check_routing(self)

    @property
    def factorizes(self):
        """Whether experts have a factorised gate, whose first factor their scores come from."""
        return "w_low" in ROUTERS[self.router].declare(self)

    @property
    def is_linear(self):
        """Whether a parameter `router` (E, D) is compared with tokens."""
        return "router" in ROUTERS[self.router].declare(self)

    @property
    def has_rows(self):
        """Whether every expert has a direction in token space that its router attracts."""
        return ROUTERS[self.router].rows is not None

    @property
    def has_probabilities(self):
        """Whether scores become probabilities, of which the highest choose and weigh."""
        return ROUTERS[self.router].choose is top

    @property
    def chooses_top(self):
        """Whether that is so on every step."""
        return self.has_probabilities and not self.competes

    @property
    def competes(self):
        """Whether experts may compete during training."""
        return self.router == "competition"

    def check_vocabulary(self, tokens):
        """Refuses a tokenizer with more tokens than the embedding has rows."""
        if tokens > self.vocab_size:
            raise BadInput(f"model.vocab_size: {self.vocab_size} rows are too few for the tokenizer's {tokens} tokens")

    def identity(self):
        """The fields that make it this model; the others say only how it is computed."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in HOW}

    @property
    def initializer(self):
        """Of every matrix: truncated normal, cut at three sigma."""
        return jax.nn.initializers.truncated_normal(self.init_std, lower=-3.0, upper=3.0)

    @property
    def router_initializer(self):
        """Of router rows: as other matrices, or orthonormal."""
        return jax.nn.initializers.orthogonal() if self.router_init == "orthogonal" else self.initializer

    @property
    def head_width(self):
        return self.width // self.heads

    @property
    def kv_width(self):
        return self.kv_heads * self.head_width

    def parameters(self, experts=None):
        """Exact number of parameters; with `experts` experts a layer instead of all of them."""
        attention = 2 * self.width * self.width + 2 * self.width * self.kv_width + self.width + self.kv_width
        sizes = {name: math.prod(shape) for name, (_, shape) in declare(self).items()}
        if experts:
            sizes |= {name: sizes[name] * experts // self.experts for name in (*GATED, *FACTORIZED) if name in sizes}
        embeddings = self.vocab_size * self.width * (1 if self.tie_embeddings else 2)
        return embeddings + self.layers * (attention + sum(sizes.values()) + 2 * self.width) + self.width

    def active_parameters(self):
        """Those a token meets: all but the experts it is not routed to."""
        return self.parameters(self.experts_per_token)

    def flops_per_token(self, length):
        """Twice the multiply-adds of a token's forward pass: matmuls, and causal attention over `length` tokens."""
        attention = 2 * self.width * self.width + 2 * self.width * self.kv_width + 2 * self.width * (length + 1) / 2
        expert = (self.gate_rank or self.width) * self.expert_width + 2 * self.width * self.expert_width
        shared = 3 * self.shared_experts * self.width * self.expert_width
        moe = ROUTERS[self.router].work(self) + self.experts_per_token * expert + shared
        return 2 * (self.layers * (attention + moe) + self.vocab_size * self.width)


HOW = ("dtype", "remat", "attention_implementation", "experts_implementation", "scan_unroll")
