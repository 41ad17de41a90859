"""Loss-free balancing (arXiv 2408.15664): the load, not a gradient, moves a bias on the choice.

    experts = top K of score + bias, weighed by score alone
    bias += rate sign(mean_e count - count)

The bias starts at 0 and is moved after each optimizer step. No balance loss competes with the
language model's loss.
"""

import jax
import jax.numpy as jnp


def balance_bias(bias_LE: jax.Array, assignments_LE: jax.Array, rate: float) -> jax.Array:
    """The next bias, (L, E).

    The bias of an expert moves by `rate`: up if its count is below the mean of its layer, down if
    above. It stays if the count is exactly the mean.
    """
    # Whole numbers are compared: a mean that is rounded to float32 would move experts that are
    # exactly at it. E count may exceed an int32, so count is compared with the quotient and the
    # rest of total / E.
    experts = assignments_LE.shape[-1]
    total_L1 = jnp.sum(assignments_LE, axis=-1, keepdims=True)
    quotient_L1 = total_L1 // experts
    rest_L1 = total_L1 % experts
    # An expert whose count is the quotient is below the mean if there is a rest.
    sign_LE = jnp.where(
        assignments_LE == quotient_L1, jnp.sign(rest_L1), jnp.sign(quotient_L1 - assignments_LE)
    )
    return bias_LE + rate * sign_LE
