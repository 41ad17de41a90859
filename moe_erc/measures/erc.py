"""ERC of the clean router: how far foreign responses exceed alpha times an expert's own.

ERC(alpha)       the loss of `losses/erc.py`; a vanilla MoE is 0 at alpha 3 to 5 (paper, Table 2)
vanishing alpha  the smallest alpha at which ERC is 0, which is
                 max_{i != j} max(M[i, j] / M[i, i], M[i, j] / M[j, j])
noisy ERC        the loss as it is trained with, mean over draws (`diagnosis/layers.py`)
"""

import functools

import jax
import jax.numpy as jnp

from moe_erc.losses.erc import coupling_penalty
from moe_erc.measures.base import Measure

ALPHAS = (1.0, 2.0, 3.0, 4.0, 5.0)


def foreign(M_EE: jax.Array) -> jax.Array:
    """The matrix without its diagonal, which becomes 0."""
    return jnp.where(jnp.eye(len(M_EE), dtype=bool), 0, M_EE)


def _vanishing_alpha(M_EE):
    diagonal_E = jnp.diagonal(M_EE)
    foreign_EE = foreign(M_EE)
    lowest_EE = jnp.minimum(diagonal_E[:, None], diagonal_E[None, :])
    return jnp.max(jnp.where(foreign_EE > 0, foreign_EE / lowest_EE, 0))


def _at(alpha):
    compute = functools.partial(coupling_penalty, alpha=alpha)
    key = f"erc/alpha_{alpha:g}"
    label = f"ERC at alpha {alpha:g}"
    return Measure(key, label, "norm units", True, compute, "lower", "matrix", digits=4)


AT_ALPHAS = tuple(_at(alpha) for alpha in ALPHAS)
ERC = AT_ALPHAS[0]
NOISY = Measure(
    "erc/noisy", "noisy ERC at alpha 1", "norm units", per_layer=True, better="lower", digits=4
)
VANISHING_ALPHA = Measure(
    "erc/vanishing_alpha", "vanishing alpha", "", True, _vanishing_alpha, "lower", "matrix"
)

MEASURES = (*AT_ALPHAS, NOISY, VANISHING_ALPHA)
