"""Loss-free balancing (arXiv 2408.15664): the load, not a gradient, moves a bias on who is chosen.

    experts = top K of score + bias, weighed by score alone
    bias += rate sign(mean_e count - count)

The bias starts at 0 and is moved after each optimizer step; no loss competes with the language
model's.
"""

import jax
import jax.numpy as jnp


def balance_bias(bias_LE: jax.Array, assignments_LE: jax.Array, rate: float) -> jax.Array:
    """The next bias: a step of `rate` up for experts below their layer's mean count, down above,
    none at it.

    Whole numbers are compared, E count with the total: a mean that is rounded to float32 would move
    experts that are exactly at it. E count may exceed an int32, so count is compared with the
    quotient and the rest of total / E.
    """
    experts = assignments_LE.shape[-1]
    total_L1 = jnp.sum(assignments_LE, axis=-1, keepdims=True)
    whole_L1 = total_L1 // experts
    rest_L1 = total_L1 % experts  # above 0, an expert with the whole quotient is below the mean
    sign_LE = jnp.where(
        assignments_LE == whole_L1, jnp.sign(rest_L1), jnp.sign(whole_L1 - assignments_LE)
    )
    return bias_LE + rate * sign_LE
