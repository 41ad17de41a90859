"""Models that cannot be built, refused in one line that names the value and the mend."""

import dataclasses
import math

from moe_erc.checks import BadInput
from moe_erc.moe.routers import ROUTERS
from moe_erc.moe.routers.xmoe import FEWEST_EXPERTS

CHOICES = {
    "router": tuple(ROUTERS),
    "router_init": ("normal", "orthogonal"),
    "dtype": ("float32", "bfloat16"),
    "remat": ("none", "block"),
    "attention_implementation": ("auto", "xla", "cudnn"),
    "experts_implementation": ("auto", "dense", "block_loop", "ragged", "pallas", "tokamax"),
}
MAY_BE_ZERO = ("shared_experts", "gate_rank")


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
        "top_p": (0 < config.top_p <= 1, "above 0 and at most 1 (1 keeps all K)"),
        "bias_rate": (0 <= config.bias_rate < math.inf, "at least 0 and finite"),
        "mpi_scale": (0 < config.mpi_scale < math.inf, "positive and finite"),
        "competition_rate": (0 <= config.competition_rate <= 1, "from 0 to 1"),
        "theta": (0 < config.theta < math.inf, "positive and finite"),
        "controller_rate": (0 <= config.controller_rate < math.inf, "at least 0 and finite"),
    }.items():
        if not holds:
            raise BadInput(f"model.{name}: {getattr(config, name)} must be {limit}")


def check_routing(config):
    """Refuses what the model's router cannot do."""
    rank = config.width * config.expert_width // (config.width + config.expert_width)
    for refused, key, reason in (
        (config.factorizes and not config.gate_rank, "gate_rank", f"factorises gates; {rank} keeps their size"),
        (config.gate_rank and not config.factorizes, "gate_rank", "reads whole gates; set it to 0"),
        (config.router_init == "orthogonal" and not config.is_linear, "router_init", "has no rows to be orthogonal"),
        (
            config.renormalize and not config.has_probabilities,
            "renormalize",
            "has gates, not probabilities; set it to False",
        ),
        (config.top_p < 1 and not config.chooses_top, "top_p", "chooses by other means than probability; set it to 1"),
        (config.bias_rate and not config.chooses_top, "bias_rate", "has no top K that a bias could turn; set it to 0"),
        (
            config.router == "xmoe" and config.experts < FEWEST_EXPERTS,
            "experts",
            "compares them by angle in E / 2 dimensions, and in a single one all cosines are 1 or -1 and tie; "
            f"use at least {FEWEST_EXPERTS}",
        ),
    ):
        if refused:
            raise BadInput(f"model.{key}: {getattr(config, key)}, but router {config.router!r} {reason}")
    if config.bias_rate and config.top_p < 1:
        raise BadInput(
            f"model.bias_rate: {config.bias_rate} beside top_p {config.top_p}: a prefix of the most probable experts "
            "is not one of the most preferred; use one of the two"
        )
