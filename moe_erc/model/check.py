"""Models that cannot be built, refused in one line that names the value and the mend."""

import dataclasses
import math

from moe_erc.checks import BadInput

CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "remat": ("none", "block"),
    "attention_implementation": ("auto", "xla", "cudnn"),
    "experts_implementation": ("auto", "dense", "block_loop", "ragged", "pallas", "tokamax"),
}
MAY_BE_ZERO = ("shared_experts",)


def check_sizes(config):
    """Refuses sizes below 1, words that are no choice, and widths that cannot be split."""
    for field in dataclasses.fields(config):
        lowest = 0 if field.name in MAY_BE_ZERO else 1
        if field.type is int and getattr(config, field.name) < lowest:
            raise BadInput(f"model.{field.name}: {getattr(config, field.name)} is below {lowest}")
    for name, known in CHOICES.items():
        if getattr(config, name) not in known:
            raise BadInput(f"model.{name}: {getattr(config, name)!r} is not one of {', '.join(known)}")
    if config.experts_per_token > config.experts:
        raise BadInput(
            f"model.experts_per_token: {config.experts_per_token} is more than the {config.experts} experts there are"
        )
    if config.width % config.heads:
        raise BadInput(
            f"model.width: {config.width} cannot be split over {config.heads} heads; use a multiple of model.heads"
        )
    if config.head_width % 2:
        raise BadInput(
            f"model.width: {config.width} over {config.heads} heads is {config.head_width} each; RoPE needs an even one"
        )
    if config.heads % config.kv_heads:
        raise BadInput(
            f"model.kv_heads: {config.heads} heads cannot share {config.kv_heads} key/value heads; use a divisor"
        )


def check_numbers(config):
    """Refuses real numbers out of their range."""
    for name, (holds, limit) in {
        "rope_theta": (0 < config.rope_theta < math.inf, "positive and finite"),
        "norm_eps": (0 < config.norm_eps < math.inf, "positive and finite"),
        "init_std": (0 < config.init_std < math.inf, "positive and finite"),
        "clip_qkv": (0 <= config.clip_qkv < math.inf, "at least 0 and finite"),
    }.items():
        if not holds:
            raise BadInput(f"model.{name}: {getattr(config, name)} must be {limit}")
