"""The diagnosis of any MoE, whoever trained it, from its router rows and gates: one layer at a
time, on the host.

Beside the measures that a run has of itself there are the noisy ERC and the best one-to-one
matching, and those of the coupling matrix once more for a matrix without its scales, which compares
directions alone:

    normalized M[i, j] = sqrt(D) M[i, j] / (|proxy_i| |w_j|_F)        1 for an isotropic matrix
"""

import functools
import gc
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.optimize import linear_sum_assignment
from scipy.sparse.linalg import eigsh

from moe_erc.diagnosis.coupling import gate_norms
from moe_erc.losses.erc import coupling_matrix, perturb
from moe_erc.measures.coupling import ALIGNMENT, DISPLACED, MATCHING_GAIN
from moe_erc.measures.erc import ERC, NOISY
from moe_erc.measures.registry import reading
from moe_erc.numerics import divide

SMALL = 32  # at most so wide, LAPACK is asked for all singular values


class Layers(NamedTuple):
    """What is found of the layers of a model; every array has a leading axis L."""

    numbers: Sequence[int]  # of the layers in the model
    measures: dict[str, np.ndarray]  # by key, (L,)
    normalized: dict[str, np.ndarray]  # those of the coupling matrix, of M without its scales
    matrices: dict[
        str, np.ndarray
    ]  # (L, E, E): "raw", "normalized", and "noisy", the mean of the raw one over draws


def diagnose(
    layers: Iterable[tuple[np.ndarray, np.ndarray]],
    numbers: Sequence[int],
    draws: int = 16,
    seed: int = 0,
) -> Layers:
    """The diagnosis of layers (router_ED, w_gate_EDF), arrays of any float type; computes in
    float32.

    A layer is let go before the next is asked for. `draws` of the noise make the noisy ERC.
    """
    rng = jax.random.key(seed)
    found = []
    for layer in layers:  # not enumerated: enumerate would hold a layer until it has the next
        keys = jax.random.split(jax.random.fold_in(rng, len(found)), draws)
        found.append(_diagnose_layer(layer, keys))
        del layer
        gc.collect()  # until then jax keeps what it read in place
    return Layers(numbers, *jax.tree.map(lambda *leaves: np.stack(leaves), *found))


def _diagnose_layer(layer, keys):
    """(measures, normalized, matrices) of one layer."""
    router_ED, w_gate_EDF = map(_without_float16, layer)
    found = _on_device(router_ED, w_gate_EDF, keys, reading("matrix"), reading("weights"))
    measures, normalized, matrices = jax.device_get(found)
    measures |= _matching(matrices["raw"])
    normalized |= _matching(matrices["normalized"])
    measures[ALIGNMENT.key] = _alignment(router_ED, w_gate_EDF, np.diagonal(matrices["raw"]))
    return measures, normalized, matrices


def _without_float16(array):
    """NumPy converts float16 anywhere; XLA does not on a processor without F16C."""
    return np.asarray(array, np.float32) if array.dtype == np.float16 else array


@functools.partial(jax.jit, static_argnums=(3, 4))
def _on_device(router_ED, w_gate_EDF, keys, of_matrix, of_weights):
    """All but what libraries of the host find."""
    router_ED = router_ED.astype(jnp.float32)
    gate_norm_E = gate_norms(w_gate_EDF)

    def matrices(proxy_ED):
        M_EE = coupling_matrix(proxy_ED, w_gate_EDF)
        proxy_norm_E1 = jnp.linalg.norm(proxy_ED, axis=-1)[:, None]
        scale_EE = proxy_norm_E1 * gate_norm_E / proxy_ED.shape[-1] ** 0.5
        return {"raw": M_EE, "normalized": divide(M_EE, scale_EE)}

    def draw(key):
        drawn = matrices(perturb(router_ED, key))
        return drawn["raw"], jax.tree.map(ERC.compute, drawn)

    def of_form(form):
        found = {measure.key: measure.compute(clean[form]) for measure in of_matrix}
        return found | {NOISY.key: jnp.mean(erc_S[form])}

    clean = matrices(router_ED)
    noisy_SEE, erc_S = lax.map(draw, keys)
    weights = {measure.key: measure.compute(router_ED, gate_norm_E) for measure in of_weights}
    matrices_found = clean | {"noisy": jnp.mean(noisy_SEE, axis=0)}
    return of_form("raw") | weights, of_form("normalized"), matrices_found


def _matching(M_EE):
    rows_E, experts_E = linear_sum_assignment(M_EE, maximize=True)
    diagonal = np.trace(M_EE)
    return {
        DISPLACED.key: np.mean(rows_E != experts_E),
        MATCHING_GAIN.key: M_EE[rows_E, experts_E].sum() / diagonal - 1 if diagonal > 0 else np.inf,
    }


def _alignment(router_ED, w_gate_EDF, response_E):
    """Mean over experts of |r W| / (|r| sigma_max(W)), 0 for zeros; |r W| is M's diagonal."""
    largest_E = np.linalg.norm(np.asarray(router_ED, np.float32), axis=-1)
    largest_E *= [_largest_singular_value(np.asarray(w_DF, np.float32)) for w_DF in w_gate_EDF]
    zeros_E = np.zeros_like(response_E)
    return np.mean(np.divide(response_E, largest_E, out=zeros_E, where=largest_E > 0))


def _largest_singular_value(w_DF):
    """By Lanczos steps on the smaller Gram matrix: a hundredth of the work of a whole SVD."""
    scale = np.abs(w_DF).max()
    if scale == 0 or min(w_DF.shape) <= SMALL:
        return np.linalg.norm(w_DF, 2)
    w_DF = w_DF / scale  # squares of small weights would underflow
    gram = w_DF.T @ w_DF if w_DF.shape[0] > w_DF.shape[1] else w_DF @ w_DF.T
    start = np.ones(len(gram), gram.dtype)  # a random one would differ from call to call
    return scale * eigsh(gram, k=1, v0=start, return_eigenvectors=False, tol=1e-6)[0] ** 0.5
