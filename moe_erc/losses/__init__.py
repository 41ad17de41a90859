"""The losses, one file each, by the names that their config blocks have.

A new loss is one file, one line here and one block in the config.
"""

from moe_erc.losses import (
    competition,
    erc,
    language_model,
    load_balance,
    output_overlap,
    path_coupling,
    router_orthogonality,
    router_z,
    routing_entropy,
    routing_variance,
    simbal,
    specialization,
)

LOSSES = {
    "lm": language_model.LOSS,
    "load_balance": load_balance.LOSS,
    "router_z": router_z.LOSS,
    "competition": competition.LOSS,
    "output_overlap": output_overlap.LOSS,
    "path_coupling": path_coupling.LOSS,
    "routing_entropy": routing_entropy.LOSS,
    "routing_variance": routing_variance.LOSS,
    "specialization": specialization.LOSS,
    "erc": erc.LOSS,
    "router_orthogonality": router_orthogonality.LOSS,
    "simbal": simbal.LOSS,
}
