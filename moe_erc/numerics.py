"""Arithmetic that is defined at 0, with its gradient.

`jnp.where(b == 0, 0, a / b)` has the right value and a NaN for a gradient, because the gradient of
the quotient is computed and multiplied by 0. Each function here therefore replaces the denominator
or the argument as well, so that both branches are finite. A NaN stays a NaN.
"""

import jax
import jax.numpy as jnp
from jax import lax


def divide(a: jax.typing.ArrayLike, b: jax.typing.ArrayLike) -> jax.Array:
    """a / b, broadcast, as floating point, also for integers such as counts.

    Where b is 0 the value is 0, and the gradients with respect to a and b are 0.
    """
    return jnp.where(b == 0, 0, a / nonzero(b))


def nonzero(b: jax.typing.ArrayLike) -> jax.Array:
    """b with 1 in place of 0: a denominator for an `a` that is 0 wherever b is.

    Where b is 0, the value of a / nonzero(b) is a. Its gradient is 1 with respect to a, and 0 with
    respect to b. `divide` would add a select, which changes how XLA rounds the quotient.
    """
    return jnp.where(b == 0, 1, b)


def square_root(x: jax.typing.ArrayLike) -> jax.Array:
    """The square root of x, element by element.

    At 0 the value is 0 and the gradient is 0, where that of `jnp.sqrt` is infinite. Negative
    elements give NaN.
    """
    is_zero = x == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, x)))


def length(x: jax.Array) -> jax.Array:
    """The Euclidean length of x along the last axis, also where float32 does not hold the squares.

    For a vector of zeros the value is 0 and the gradient is NaN. Use it only for what is constant
    under differentiation.
    """
    largest = jnp.max(jnp.abs(x), axis=-1)
    return largest * jnp.linalg.norm(divide(x, largest[..., None]), axis=-1)


def unit(x: jax.Array) -> jax.Array:
    """x / |x| along the last axis, for a vector of any length that float32 holds.

    For a vector of zeros the value is a vector of zeros, and the gradient is 0.
    """
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    # The derivative of 1 / |x| overflows for an |x| of 1e-13. That of x over its largest component
    # does not, because the vector then has a length of at least 1.
    x = divide(x, largest)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return jnp.where(largest == 0, 0, x * lax.rsqrt(jnp.where(largest == 0, 1, square)))


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of `values` over the elements where `mask`, a bool of the same shape, is True.

    Where the mask is True nowhere, the value is 0 and the gradient is 0. An element whose mask is
    False may be NaN.
    """
    return divide(jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask))
