"""Rows sorted by group times the matrix of their group, by libraries: XLA on TPU, tokamax on GPU.

    y[m]  = x[m] @ w[g]
    dx[m] = dy[m] @ w[g].T
    dw[g] = sum over rows m of g of outer(x[m], dy[m])

`lax.ragged_dot` is native on TPU for the first two. Its own weight gradient is dense there, every
row times every group under a mask, so dw walks the rows of each group in blocks. What y and dx hold
behind the last group is unspecified. `pallas_matmul.py` has kernels of the project with the same
signature.
"""

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 512  # rows; the last block of a group is half empty on average
TRANSPOSED = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


@jax.custom_vjp
def grouped_matmul(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """(M, F) in the dtype of x, accumulated in float32.

    Groups follow each other and may be empty. The gradient of w does not read rows behind the last
    group, which may hold NaN.
    """
    return lax.ragged_dot(x_MD, w_EDF, sizes_E, preferred_element_type=x_MD.dtype)


def _forward(*inputs):
    return grouped_matmul(*inputs), inputs


def _backward(inputs, dy_MF):
    x_MD, w_EDF, sizes_E = inputs
    dx_MD = lax.ragged_dot_general(
        dy_MF, w_EDF, sizes_E, TRANSPOSED, preferred_element_type=x_MD.dtype
    )
    return dx_MD, _weight_gradient(x_MD, dy_MF, w_EDF, sizes_E), None


grouped_matmul.defvjp(_forward, _backward)


@jax.custom_vjp
def tokamax_matmul(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """`grouped_matmul` by the kernels of tokamax, an optional extra.

    Rows behind the last group are zeros here: its gradient of w may read them.
    """
    return _inside(sizes_E, _tokamax(x_MD, w_EDF, sizes_E))


def _tokamax_forward(*inputs):
    return tokamax_matmul(*inputs), inputs


def _tokamax_backward(inputs, dy_MF):
    x_MD, w_EDF, sizes_E = inputs

    def product(x_MD, w_EDF):
        return _tokamax(x_MD, w_EDF, sizes_E)

    _, pull_back = jax.vjp(product, x_MD, w_EDF)
    dx_MD, dw_EDF = pull_back(dy_MF)
    # Its Triton kernel leaves the gradient of an empty group unwritten.
    return _inside(sizes_E, dx_MD), jnp.where(sizes_E[:, None, None] > 0, dw_EDF, 0), None


tokamax_matmul.defvjp(_tokamax_forward, _tokamax_backward)


def _tokamax(x_MD, w_EDF, sizes_E):
    import tokamax

    # On a GPU, tokamax may by itself choose XLA's implementation, which is dense there.
    kernels = None if jax.default_backend() == "cpu" else ("mosaic", "triton")
    return tokamax.ragged_dot(
        x_MD, w_EDF, sizes_E, preferred_element_type=x_MD.dtype, implementation=kernels
    )


def _inside(sizes_E, rows):
    """The rows with zeros behind the last group, where `ragged_dot` leaves unspecified values."""
    is_inside_M1 = jnp.arange(len(rows))[:, None] < jnp.sum(sizes_E)
    return jnp.where(is_inside_M1, rows, 0)


def _weight_gradient(x_MD, dy_MF, w_EDF, sizes_E):
    """dw, (E, D, F): the rows of each group are walked in blocks."""
    size = min(BLOCK, len(x_MD))

    def group(_, bounds_and_matrix):
        start, end, w_DF = bounds_and_matrix

        def block(index, dw_DF):
            first = start + index * size
            # A slice that would pass the last row slides back over rows already done.
            rows_R = jnp.minimum(first, len(x_MD) - size) + jnp.arange(size)
            own_R1 = ((rows_R >= first) & (rows_R < end))[:, None]
            x_RD = lax.dynamic_slice_in_dim(x_MD, rows_R[0], size)
            dy_RF = lax.dynamic_slice_in_dim(dy_MF, rows_R[0], size)
            x_RD = jnp.where(own_R1, x_RD, 0)
            dy_RF = jnp.where(own_R1, dy_RF, 0)
            return dw_DF + jnp.matmul(x_RD.T, dy_RF, preferred_element_type=jnp.float32)

        blocks = (end - start + size - 1) // size
        dw_DF = lax.fori_loop(0, blocks, block, jnp.zeros_like(w_DF, jnp.float32))
        return None, dw_DF.astype(w_DF.dtype)

    ends_E = jnp.cumsum(sizes_E)
    _, dw_EDF = lax.scan(group, None, (ends_E - sizes_E, ends_E, w_EDF))
    return dw_EDF
