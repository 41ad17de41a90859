"""The whole coupling of an MoE, whoever trained it, from its router rows and gates: one layer at a time, on the host.

Beside what `coupling.py` measures, of M with and without its scales:

noisy ERC      the loss as it is trained with, mean over draws of the noise
displaced      share of rows to which the best one-to-one matching, argmax_s sum_i M[i, s(i)], gives another expert
matching gain  how much more than the diagonal it collects: sum_i M[i, s(i)] / tr(M) - 1

    normalized M[i, j] = sqrt(D) M[i, j] / (|proxy_i| |w_j|_F)          1 for an isotropic matrix, whatever the norms
"""

import gc
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.optimize import linear_sum_assignment
from scipy.sparse.linalg import eigsh

from moe_erc.analysis.coupling import erc_by_alpha, gate_norms, measure_matrix, measure_weights
from moe_erc.losses.erc import coupling_matrix, perturb
from moe_erc.numerics import divide

SMALL = 32  # at most so wide, LAPACK is asked for all singular values


def survey(layers, draws=16, seed=0):
    """(measures, matrices) of an iterable of (router_ED, w_gate_EDF), arrays of any float type; computes in float32.

    measures: by layer, those of the normalized M again under "normalized". matrices: "raw", "normalized" and "noisy",
    the mean of the raw one over draws, each (L, E, E). A layer is let go before the next is asked for.
    """
    rng = jax.random.key(seed)

    def survey_layer(number, layer):
        layer = tuple(map(_without_float16, layer))
        keys = jax.random.split(jax.random.fold_in(rng, number), draws)
        measures, matrices = jax.device_get(_survey_layer(*layer, keys))
        for form, of_form in (("raw", measures), ("normalized", measures["normalized"])):
            of_form |= _matching(matrices[form])
        measures["alignment_L"] = _alignment(*layer, np.diagonal(matrices["raw"]))
        gc.collect()  # until then jax keeps what it read in place
        return measures, matrices

    by_layer = map(survey_layer, itertools.count(), layers)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *by_layer)


def _without_float16(array):
    """XLA has no program for float16 on a processor that cannot convert it (no F16C); NumPy converts it anywhere."""
    return np.asarray(array, np.float32) if array.dtype == np.float16 else array


@jax.jit
def _survey_layer(router_ED, w_gate_EDF, keys):
    """All but what libraries of the host find."""
    router_ED, gate_norm_E = router_ED.astype(jnp.float32), gate_norms(w_gate_EDF)

    def matrices(proxy_ED):
        M_EE = coupling_matrix(proxy_ED, w_gate_EDF)
        scale_EE = jnp.linalg.norm(proxy_ED, axis=-1)[:, None] * gate_norm_E / proxy_ED.shape[-1] ** 0.5
        return {"raw": M_EE, "normalized": divide(M_EE, scale_EE)}

    def draw(key):
        drawn = matrices(perturb(router_ED, key))
        return drawn["raw"], jax.tree.map(erc_by_alpha, drawn)

    clean, (noisy_SEE, erc_SA) = matrices(router_ED), lax.map(draw, keys)
    measures, normalized = (
        measure_matrix(clean[form]) | {"noisy_erc_LA": jnp.mean(erc_SA[form], axis=0)} for form in clean
    )
    measures |= measure_weights(router_ED, gate_norm_E) | {"normalized": normalized}
    return measures, clean | {"noisy": jnp.mean(noisy_SEE, axis=0)}


def _matching(M_EE):
    rows_E, experts_E = linear_sum_assignment(M_EE, maximize=True)
    diagonal = np.trace(M_EE)
    return {
        "displaced_L": np.mean(rows_E != experts_E),
        "matching_gain_L": M_EE[rows_E, experts_E].sum() / diagonal - 1 if diagonal > 0 else np.inf,
    }


def _alignment(router_ED, w_gate_EDF, response_E):
    """Mean over experts of |r W| / (|r| sigma_max(W)), the numerator being the diagonal of M; 0 for zeros."""
    largest_E = np.linalg.norm(np.asarray(router_ED, np.float32), axis=-1)
    largest_E *= [_largest_singular_value(np.asarray(w_DF, np.float32)) for w_DF in w_gate_EDF]
    return np.mean(np.divide(response_E, largest_E, out=np.zeros_like(response_E), where=largest_E > 0))


def _largest_singular_value(w_DF):
    """By Lanczos steps on the smaller Gram matrix: a hundredth of the work of all singular values."""
    scale = np.abs(w_DF).max()
    if scale == 0 or min(w_DF.shape) <= SMALL:
        return np.linalg.norm(w_DF, 2)
    w_DF = w_DF / scale  # squares of small weights would underflow
    gram = w_DF.T @ w_DF if w_DF.shape[0] > w_DF.shape[1] else w_DF @ w_DF.T
    start = np.ones(len(gram), gram.dtype)  # a random one would differ from call to call
    return scale * eigsh(gram, k=1, v0=start, return_eigenvectors=False, tol=1e-6)[0] ** 0.5
