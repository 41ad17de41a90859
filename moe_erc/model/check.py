"""Models that cannot be built, refused in one line that names the value and the mend."""

from moe_erc.checks import BadInput, check_fields
from moe_erc.moe.routers.xmoe import FEWEST_EXPERTS


def check_sizes(config):
    """Refuses fields beyond their limits, and widths that cannot be split."""
    check_fields(config, "model")
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
