"""Are router rows coupled to their experts? Read off the parameters alone, with the clean router.

diagonal rows    share of the rows of M whose largest entry is the diagonal's; columns likewise
noise bound      epsilon of `losses/erc.py`, mean over experts: how far a row may move
alignment        |r W| / (|r| sigma_max(W)) of a row r and its expert's gate W, mean over experts
displaced rows   share of rows to which argmax_s sum_i M[i, s(i)] gives another expert
matching gain    what that matching collects beyond the diagonal: sum_i M[i, s(i)] / tr(M) - 1

A diagonal entry that ties with another as the largest of its row or column counts as held.
Alignment is found in `diagnosis/coupling.py`, the two of the matching in `diagnosis/layers.py`.
"""

import jax.numpy as jnp

from moe_erc.losses.erc import noise_bound
from moe_erc.measures.base import Measure
from moe_erc.measures.erc import foreign


def _diagonal_rows(M_EE):
    return jnp.mean(jnp.diagonal(M_EE) >= jnp.max(foreign(M_EE), axis=1))


def _diagonal_columns(M_EE):
    return jnp.mean(jnp.diagonal(M_EE) >= jnp.max(foreign(M_EE), axis=0))


def _noise_bound(router_ED, gate_norm_E):
    return jnp.mean(noise_bound(router_ED))


MATRIX = Measure("coupling/matrix", "response", "norm units", per_layer=True)  # (L, E, E)
NOISE_BOUND = Measure(
    "coupling/noise_bound", "noise bound", "epsilon", True, _noise_bound, reads="weights"
)
DIAGONAL_ROWS = Measure(
    "coupling/diagonal_rows",
    "diagonal rows",
    "share of rows",
    True,
    _diagonal_rows,
    "higher",
    "matrix",
)
DIAGONAL_COLUMNS = Measure(
    "coupling/diagonal_columns",
    "diagonal columns",
    "share of columns",
    True,
    _diagonal_columns,
    "higher",
    "matrix",
)
ALIGNMENT = Measure(
    "coupling/alignment", "alignment", "share of sigma_max", per_layer=True, better="higher"
)
DISPLACED = Measure(
    "coupling/displaced_rows", "displaced rows", "share of rows", per_layer=True, better="lower"
)
MATCHING_GAIN = Measure(
    "coupling/matching_gain", "matching gain", "of the trace", per_layer=True, better="lower"
)

MEASURES = (
    MATRIX,
    NOISE_BOUND,
    DIAGONAL_ROWS,
    DIAGONAL_COLUMNS,
    ALIGNMENT,
    DISPLACED,
    MATCHING_GAIN,
)
