"""Do experts answer the same token differently?

    mean over ordered pairs i != j of <u_i, u_j> = (|sum_e u_e|^2 - E) / (E (E - 1)),   |u_e| = 1

A sum of E vectors per token is enough: nothing is (E, E), nor need the E answers exist at once.
"""

import jax
import jax.numpy as jnp

from moe_erc.measures.base import Measure
from moe_erc.numerics import masked_mean


def pairwise_cosine(unit_sum_BTD: jax.Array, experts: int, mask_BT: jax.Array) -> jax.Array:
    """Mean over unmasked tokens and pairs of experts of the cosine of their answers.

    It is found from the sum of the experts' unit vectors.
    In [-1 / (E - 1), 1]. Specialised experts answer the same token differently: the lower, the more
    specialised. A float32 scalar; 0 for E = 1, and without a token.
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
    "experts/output_cosine", "output cosine", "", True, _output_cosine, "lower", "layer"
)
