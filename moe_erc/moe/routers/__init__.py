"""The routers, one file per paper.

To add one: a file beside this one, a line in `ROUTERS` and a config.
"""

import dataclasses
from collections.abc import Mapping

from moe_erc.checks import BadInput, nearest, one_of
from moe_erc.moe.routers.aoe import AoE
from moe_erc.moe.routers.base import Router
from moe_erc.moe.routers.competition import Competition
from moe_erc.moe.routers.mpi import MPI
from moe_erc.moe.routers.routing_free import RoutingFree
from moe_erc.moe.routers.sigmoid import Sigmoid
from moe_erc.moe.routers.softmax import Softmax
from moe_erc.moe.routers.xmoe import XMoE

ROUTERS = {
    "softmax": Softmax,
    "aoe": AoE,
    "competition": Competition,
    "mpi": MPI,
    "routing_free": RoutingFree,
    "sigmoid": Sigmoid,
    "xmoe": XMoE,
}


def make_router(name: str, options: Mapping[str, Mapping]) -> Router:
    """The router called `name`, with its options from {router: {option: value}}.

    A missing option has its default. The options of the other routers are checked as well. BadInput
    for a router or an option that does not exist, and for a value out of its range.
    """
    one_of("model.router", name, ROUTERS)
    records = {other: _make(other, chosen) for other, chosen in options.items()}
    return records[name] if name in records else ROUTERS[name]()


def _make(name: str, options: Mapping) -> Router:
    if name not in ROUTERS:
        raise BadInput(
            f"routers.{name}: there is no such router; the nearest is {nearest(name, ROUTERS)!r}"
        )
    kind = ROUTERS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    for option in options:
        if option not in known:
            mend = f"the nearest is {nearest(option, known)!r}" if known else "it has no options"
            raise BadInput(f"routers.{name}.{option}: the router has no such option; {mend}")
    return kind(**options)
