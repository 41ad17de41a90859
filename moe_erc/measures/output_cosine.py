"""Do experts answer the same token differently?

    mean over ordered pairs i != j of <u_i, u_j> = (|sum_e u_e|^2 - E) / (E (E - 1)),   |u_e| = 1

A sum of E vectors per token is enough: no array is (E, E), and the E answers need not exist at
once.
"""

import jax
import jax.numpy as jnp

from moe_erc.measures.base import Measure
from moe_erc.numerics import masked_mean


def pairwise_cosine(unit_sum_BTD: jax.Array, experts: int, mask_BT: jax.Array) -> jax.Array:
    """Mean cosine of the answers of two experts, over unmasked tokens and pairs, a float32 scalar.

    unit_sum_BTD: the sum of the experts' unit vectors, from which the cosines follow.

    It lies in [-1 / (E - 1), 1], and is 0 for E = 1 and without a token. Specialised experts answer
    the same token differently: the lower the value, the more specialised.
    """
    if experts == 1:
        return jnp.zeros((), jnp.float32)
    length2_BT = jnp.sum(jnp.square(unit_sum_BTD.astype(jnp.float32)), axis=-1)
    cosine_BT = (length2_BT - experts) / (experts * (experts - 1))
    return masked_mean(cosine_BT, mask_BT)


def _output_cosine(layer):
    experts = layer.scores.probabilities_BTE.shape[-1]
    return pairwise_cosine(layer.unit_sum_BTD(), experts, layer.mask_BT)


OUTPUT_COSINE = Measure(
    "experts/output_cosine",
    "output cosine",
    "",
    per_layer=True,
    compute=_output_cosine,
    better="lower",
    reads="layer",
)
