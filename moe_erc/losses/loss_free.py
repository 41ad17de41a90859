"""Loss-free balancing (arXiv 2408.15664): a bias on who is chosen, moved by the load instead of by a gradient.

    experts = top K of score + bias, weighed by score alone;   bias += rate sign(mean_e load - load)

The bias starts at 0 and is moved after each optimizer step; no loss competes with the language model's.
"""

import jax.numpy as jnp


def balance_bias(bias_LE, load_LE, rate):
    """The next bias: a step of `rate` up for experts below their layer's mean load, down above, none at it."""
    return bias_LE + rate * jnp.sign(jnp.mean(load_LE, axis=-1, keepdims=True) - load_LE)
