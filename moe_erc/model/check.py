"""Refuses models that cannot be built, in one line that names the value and the mend."""

from typing import Any

from moe_erc.checks import BadInput, check_fields


def check_sizes(config: Any) -> None:
    """Refuses fields beyond their limits, and widths that cannot be split."""
    check_fields(config, "model")
    if config.experts_per_token > config.experts:
        raise BadInput(
            f"model.experts_per_token: {config.experts_per_token} is more than the "
            f"{config.experts} experts there are"
        )
    if config.width % config.heads:
        raise BadInput(
            f"model.width: {config.width} cannot be split over {config.heads} heads; "
            "use a multiple of model.heads"
        )
    if config.head_width % 2:
        raise BadInput(
            f"model.width: {config.width} over {config.heads} heads is {config.head_width} each; "
            "RoPE needs an even one"
        )
    if config.heads % config.kv_heads:
        raise BadInput(
            f"model.kv_heads: {config.heads} heads cannot share {config.kv_heads} key/value heads; "
            "use a divisor"
        )
