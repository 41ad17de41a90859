"""Router z-loss (ST-MoE, arXiv 2202.08906): keeps router logits small, where float32 softmax is exact.

loss = mean_N logsumexp(logits_NE)^2
"""

import jax.numpy as jnp


def router_z(logsumexp2_L):
    """Mean over layers of the mean squared logsumexp, which each layer reduces to a scalar itself."""
    return jnp.mean(logsumexp2_L)
