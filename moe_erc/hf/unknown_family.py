"""What the shards of a family that nobody described hold, and the line that may describe it."""

import re
from collections.abc import Mapping
from typing import Any

from moe_erc.checks import BadInput
from moe_erc.hf.layers import IN_LAYER, OTHERS
from moe_erc.hf.moe_config import EXPERTS, WIDTH, number
from moe_erc.hf.shards import Tensor

MOST_SHOWN = 8  # tensors in a message
NOT_ROUTED = re.compile(r"shared|bias|scale|norm|attn|attention|down|w2|fc2")
ROUTER_NAME = re.compile(r"gate|router")
GATE_NAME = re.compile(r"gate|w1|fc1|input_linear")
GATE_AND_UP = re.compile(r"gate_up|w13|fc1|input_linear")


def refusal(types: list, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BadInput:
    """The refusal: which tensors were found, and which --family may read them."""
    kind = next((word for word in types if word is not None), None)
    text = f"config.json: model_type {kind!r} is no family of docs/huggingface.md"
    E, D = _sizes(config)
    if E is None or D is None:
        return BadInput(
            f"{text}, and has none of {', '.join(EXPERTS)}, or no width; name an MoE, or add "
            "num_experts and hidden_size to config.json"
        )
    found = _by_name(tensors)
    routers = [name for name, shape in found.items() if shape == (E, D)]
    routers.sort(key=lambda name: not ROUTER_NAME.search(name))  # the likeliest first
    gates = {name: _layouts(name, shape, E, D) for name, shape in found.items()}
    gates = {name: layouts for name, layouts in gates.items() if layouts}
    shown = [f"{name} {found[name]}" for name in (*routers, *gates)][:MOST_SHOWN]
    if not routers or not gates:
        return BadInput(
            f"{text}, and no router {(E, D)} with gates of that width was found in the shards "
            f"({', '.join(shown) or 'neither'}); name both by --family=ROUTER,GATE,LAYOUT"
        )
    gate, layouts = next(iter(gates.items()))
    lines = " or ".join(f"--family='{routers[0]},{gate},{layout}'" for layout in layouts)
    return BadInput(
        f"{text}; its layers hold {', '.join(shown)}; if {routers[0]} is the router and {gate} "
        f"the gates, add {lines}"
    )


def _by_name(tensors):
    """{name in its layer, with {expert} for a number: shape} of what may be a router or a gate."""
    found = {}
    for full, tensor in tensors.items():
        match = IN_LAYER.fullmatch(full)
        if not match or OTHERS.search(match["stack"]) or NOT_ROUTED.search(match["name"]):
            continue
        name = re.sub(r"\bexperts\.\d+\.", "experts.{expert}.", match["name"])
        found.setdefault(name, tensor.shape)
    return found


def _sizes(config):
    """(E, D) by config.json, None for what it does not tell."""
    sizes = []
    for names in (EXPERTS, WIDTH):
        try:
            sizes.append(number(config, *names, layer=0))
        except BadInput:
            sizes.append(None)
    return sizes


def _layouts(name, shape, E, D):
    """The words of the layouts that a gate of this name and shape may have."""
    if not GATE_NAME.search(name):
        return ()
    if "{expert}" in name:
        return ("expert",) if len(shape) == 2 and shape[1] == D else ()
    if len(shape) == 2:
        is_flat = "expert" in name and shape[0] % E == 0 and shape[1] == D
        return ("flat",) if is_flat else ()
    if len(shape) != 3 or shape[0] != E:
        return ()
    if shape[2] == D:
        return ("halves", "interleaved_rows") if GATE_AND_UP.search(name) else ("gates",)
    return ("column_halves", "interleaved_columns") if shape[1] == D else ()
