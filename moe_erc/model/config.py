"""The model's sizes, frozen, with exact counts of parameters and FLOPs.

A size that cannot be built is refused here, before anything is compiled.
"""

import dataclasses
import math

import jax

from moe_erc.moe.experts import FACTORIZED, GATED
from moe_erc.moe.layer import declare
from moe_erc.moe.routers import ROUTERS
from moe_erc.moe.routing import top


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Every field is explained in `configs/base.py`, where the values come from."""

    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    experts: int
    experts_per_token: int
    expert_width: int
    router: str
    router_init: str
    renormalize: bool
    top_p: float
    bias_rate: float
    shared_experts: int
    gate_rank: int
    mpi_scale: float
    competition_rate: float
    competition_layers: int
    theta: float
    controller_rate: float
    rope_theta: float
    norm_eps: float
    init_std: float
    tie_embeddings: bool
    dtype: str
    remat: str
    scan_unroll: int
    attention_implementation: str
    experts_implementation: str

    def __post_init__(self):
        for field in dataclasses.fields(self):
            lowest = 0 if field.name in MAY_BE_ZERO else 1
            if field.type is int and getattr(self, field.name) < lowest:
                raise ValueError(f"model.{field.name}: {getattr(self, field.name)} is below {lowest}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"model.{name}: {getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"model.experts_per_token: {self.experts_per_token} is more than the {self.experts} experts there are"
            )
        if self.width % self.heads:
            raise ValueError(
                f"model.width: {self.width} cannot be split over {self.heads} heads; use a multiple of model.heads"
            )
        if self.head_width % 2:
            raise ValueError(
                f"model.width: {self.width} over {self.heads} heads is {self.head_width} each; RoPE needs an even one"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.kv_heads: {self.heads} heads cannot share {self.kv_heads} key/value heads; use a divisor"
            )
        self._check_routing()

    def _check_routing(self):
        """Refuses what no router can do, and what this one cannot."""
        for name, (holds, limit) in {
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (1 keeps all K)"),
            "bias_rate": (0 <= self.bias_rate < math.inf, "at least 0 and finite"),
            "mpi_scale": (0 < self.mpi_scale < math.inf, "positive and finite"),
            "competition_rate": (0 <= self.competition_rate <= 1, "from 0 to 1"),
            "theta": (0 < self.theta < math.inf, "positive and finite"),
            "controller_rate": (0 <= self.controller_rate < math.inf, "at least 0 and finite"),
        }.items():
            if not holds:
                raise ValueError(f"model.{name}: {getattr(self, name)} must be {limit}")
        rank = self.width * self.expert_width // (self.width + self.expert_width)
        for refused, key, reason in (
            (self.factorizes and not self.gate_rank, "gate_rank", f"scores by a factorised gate; {rank} keeps its size"),
            (self.gate_rank and not self.factorizes, "gate_rank", "reads whole gates; set it to 0"),
            (self.router_init == "orthogonal" and not self.is_linear, "router_init", "has no rows to be orthogonal"),
            (self.renormalize and not self.chooses_top, "renormalize", "has gates, not probabilities; set it to False"),
            (self.top_p < 1 and not self.chooses_top, "top_p", "chooses by other means than probability; set it to 1"),
            (self.bias_rate and not self.chooses_top, "bias_rate", "has no top K that a bias could turn; set it to 0"),
        ):
            if refused:
                raise ValueError(f"model.{key}: {getattr(self, key)}, but router {self.router!r} {reason}")
        if self.bias_rate and self.top_p < 1:
            raise ValueError(
                f"model.bias_rate: {self.bias_rate} beside top_p {self.top_p}: a prefix of the most probable experts "
                "is not one of the most preferred; use one of the two"
            )

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
            raise ValueError(
                f"model.vocab_size: {self.vocab_size} rows are too few for the tokenizer's {tokens} tokens"
            )

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


CHOICES = {
    "router": tuple(ROUTERS),
    "router_init": ("normal", "orthogonal"),
    "dtype": ("float32", "bfloat16"),
    "remat": ("none", "block"),
    "attention_implementation": ("auto", "xla", "cudnn"),
    "experts_implementation": ("auto", "dense", "block_loop", "ragged"),
}
MAY_BE_ZERO = ("shared_experts", "gate_rank")
HOW = ("dtype", "remat", "attention_implementation", "experts_implementation", "scan_unroll")
