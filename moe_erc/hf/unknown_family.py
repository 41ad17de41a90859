"""What the shards of a family that nobody described hold, and the line that may describe it."""

import re
from collections.abc import Mapping
from typing import Any

from moe_erc.checks import BadInput
from moe_erc.hf.config_json import EXPERTS, WIDTH, number
from moe_erc.hf.layers import IN_LAYER, OTHERS
from moe_erc.hf.shards import Tensor

MOST_SHOWN = 8  # tensors in a message
NOT_ROUTED = re.compile(r"shared|bias|scale|norm|attn|attention|down|w2|fc2")
GATE = re.compile(r"gate|w1|fc1|w13|input_linear|up")


def describe(types: list, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BadInput:
    """The refusal: which tensors were found, and which --family may read them."""
    kind = next((word for word in types if word is not None), None)
    found = _by_name(tensors)
    E, D = _sizes(config)
    routers = [name for name, shape in found.items() if shape in ((E, D), (D, E))]
    gates = {name: layouts for name in found if (layouts := _layouts(name, found[name], E, D))}
    shown = [f"{name} {found[name]}" for name in (*routers, *gates)][:MOST_SHOWN]
    text = f"config.json: model_type {kind!r} is no family of docs/huggingface.md; "
    if not routers or not gates:
        return BadInput(
            f"{text}by config.json a router is {(E, D)}, and the shards hold no router or no gate "
            f"of that size ({', '.join(shown) or 'neither'}); name both with "
            "--family=ROUTER,GATE,LAYOUT"
        )
    gate, layouts = next(iter(gates.items()))
    lines = " or ".join(f"--family='{routers[0]},{gate},{layout}'" for layout in layouts)
    return BadInput(
        f"{text}its layers hold {', '.join(shown)}; if the first is the router, and {gate} the "
        f"gates, add {lines}"
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
    if not GATE.search(name):
        return ()
    if "{expert}" in name:
        return ("expert",) if len(shape) == 2 and shape[1] == D else ()
    if len(shape) == 2:
        return ("flat",) if E and shape[0] > E and shape[0] % E == 0 and shape[1] == D else ()
    if len(shape) != 3 or shape[0] != E:
        return ()
    is_gate_and_up = bool(re.search("up|13|fc1|input_linear", name)) or "gate" not in name
    if shape[2] == D:
        return ("halves", "interleaved_rows") if is_gate_and_up else ("gates",)
    return ("column_halves", "interleaved_columns") if shape[1] == D else ()
