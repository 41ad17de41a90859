"""A trained model as an ordinary MoE: what training re-parameterises is written out."""

import dataclasses
from collections.abc import Mapping

from moe_erc.model.transformer import Transformer


def as_softmax_router(model: Transformer, params: Mapping) -> tuple[Transformer, dict]:
    """(Transformer, params) with router "softmax" and the same outputs.

    BadInput where no softmax router computes them.
    """
    router = model.config.router.exports_as()
    ordinary = Transformer(dataclasses.replace(model.config, router=router), model.mesh)
    moe = params["layers"]["moe"] | {"router": model.router_rows(params)}
    return ordinary, params | {"layers": params["layers"] | {"moe": moe}}
