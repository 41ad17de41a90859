"""A trained model as an ordinary MoE: what training re-parameterises is written out, nothing of it remains.

MPI's rows become the router; the router of CompeteSMoE is one already.
"""

import dataclasses

from moe_erc.checks import BadInput
from moe_erc.model.transformer import Transformer


def as_softmax_router(model, params):
    """(Transformer, params) with router "softmax" and the same outputs; ValueError where no softmax router has them."""
    config = model.config
    if not config.is_linear:
        raise BadInput(f"model.router: {config.router!r} cannot be exported; a softmax router has no such scores")
    ordinary = Transformer(dataclasses.replace(config, router="softmax"), model.mesh)
    layers = params["layers"] | {"moe": params["layers"]["moe"] | {"router": model.router_rows(params)}}
    return ordinary, params | {"layers": layers}
