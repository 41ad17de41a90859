"""The model's sizes, frozen, with exact counts of parameters and FLOPs.

A size that cannot be built is refused here, before anything is compiled.
"""

import dataclasses

import jax


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
    renormalize: bool
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
            if field.type is int and getattr(self, field.name) < 1:
                raise ValueError(f"model.{field.name}: {getattr(self, field.name)} is below 1")
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
    def head_width(self):
        return self.width // self.heads

    @property
    def kv_width(self):
        return self.kv_heads * self.head_width

    def parameters(self, experts=None):
        """Exact number of parameters; with `experts` experts a layer instead of all of them."""
        attention = 2 * self.width * self.width + 2 * self.width * self.kv_width + self.width + self.kv_width
        moe = self.experts * self.width + 3 * (experts or self.experts) * self.width * self.expert_width
        embeddings = self.vocab_size * self.width * (1 if self.tie_embeddings else 2)
        return embeddings + self.layers * (attention + moe + 2 * self.width) + self.width

    def active_parameters(self):
        """Those a token meets: all but the experts it is not routed to."""
        return self.parameters(self.experts_per_token)

    def flops_per_token(self, length):
        """Twice the multiply-adds of a token's forward pass: matmuls, and causal attention over `length` tokens."""
        attention = 2 * self.width * self.width + 2 * self.width * self.kv_width + 2 * self.width * (length + 1) / 2
        moe = self.experts * self.width + 3 * self.experts_per_token * self.width * self.expert_width
        return 2 * (self.layers * (attention + moe) + self.vocab_size * self.width)


CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "remat": ("none", "block"),
    "attention_implementation": ("auto", "xla", "cudnn"),
    "experts_implementation": ("auto", "dense", "block_loop", "ragged"),
}
HOW = (*CHOICES, "scan_unroll")
