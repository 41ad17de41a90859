"""Manifold power iteration (MPI, arXiv 2606.12397): each router row turned towards what its own expert answers to.

    r_e = router[e] @ w_gate[e] @ w_gate[e].T,   r'_e = scale / sqrt(E) * r_e / |r_e|,   logits = x @ r'.T

One power step towards the gate's top singular direction in every forward, inside the graph: the gradient reaches router
and w_gate, and `router` is not overwritten. At inference r' is a constant: the model is an ordinary MoE.
"""

import jax.numpy as jnp
from jax import lax

from moe_erc.moe.routers import softmax
from moe_erc.moe.routing import Router
from moe_erc.numerics import unit


def rows(config, parameters):
    """r', (E, D), of length scale / sqrt(E) each; 0 where the power step gives 0."""
    router_ED, w_gate_EDF = parameters["router"], parameters["w_gate"]
    excited_EF = jnp.einsum("ed,edf->ef", router_ED, w_gate_EDF, precision=lax.Precision.HIGHEST)
    turned_ED = jnp.einsum("ef,edf->ed", excited_EF, w_gate_EDF, precision=lax.Precision.HIGHEST)
    return config.mpi_scale / config.experts**0.5 * unit(turned_ED)


def score(config, mesh, parameters, x_BTD):
    """Scores of the turned rows."""
    return softmax.linear_scores(x_BTD, rows(config, parameters))


ROUTER = Router(softmax.declare, score, softmax.work, rows)
