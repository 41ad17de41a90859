"""The dropless expert layer as one loop over blocks of rows, forward and backward; memory does not know the routing.

Assignments are sorted by expert. For each expert a loop with a dynamic trip count, ceil(count / BLOCK), gathers a block
of its rows from x by token, runs SwiGLU on it, weighs it and adds it into y. Nothing is padded per expert, an empty
expert costs nothing, and no (N K, .) array exists. A dynamic trip count has no reverse mode, hence the custom one:
it keeps the inputs alone and recomputes a block's two up projections.
"""

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 64  # rows; on a CPU best or within 5 % of it from 32 to 1024 rows an expert


@jax.custom_vjp
def block_loop(x_ND, weights_NK, experts_NK, expert_weights):
    """The weighed sum of the chosen experts' outputs, (N, D); see `experts.py` for the contract."""
    order_M, groups = _sort_by_expert(experts_NK, len(expert_weights[0]))
    weights_M = weights_NK.reshape(-1)

    def expert(y_ND, group_and_weights):
        group, matrices = group_and_weights

        def block(index, y_ND):
            rows, tokens = _block(order_M, group, index, experts_NK.shape)
            return y_ND.at[tokens].add(_swiglu(_take(x_ND, tokens), _take(weights_M, rows), matrices), mode="drop")

        return lax.fori_loop(0, _blocks(group), block, y_ND), None

    y_ND = lax.scan(expert, jnp.zeros_like(x_ND, jnp.float32), (groups, expert_weights))[0]
    return y_ND.astype(x_ND.dtype)


def _forward(*inputs):
    return block_loop(*inputs), inputs


def _backward(inputs, dy_ND):
    x_ND, weights_NK, experts_NK, expert_weights = inputs
    order_M, groups = _sort_by_expert(experts_NK, len(expert_weights[0]))
    weights_M = weights_NK.reshape(-1)

    def expert(token_gradients, group_and_weights):
        group, matrices = group_and_weights

        def block(index, gradients):
            dx_ND, dweights_M, dmatrices = gradients
            rows, tokens = _block(order_M, group, index, experts_NK.shape)
            _, pull_back = jax.vjp(_swiglu, _take(x_ND, tokens), _take(weights_M, rows), matrices)
            dx, dweights, extra = pull_back(_take(dy_ND, tokens).astype(jnp.float32))
            dx_ND = dx_ND.at[tokens].add(dx, mode="drop")
            dweights_M = dweights_M.at[rows].add(dweights, mode="drop")
            return dx_ND, dweights_M, jax.tree.map(jnp.add, dmatrices, extra)

        start = (*token_gradients, jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), matrices))
        *token_gradients, dmatrices = lax.fori_loop(0, _blocks(group), block, start)
        return tuple(token_gradients), jax.tree.map(lambda d, leaf: d.astype(leaf.dtype), dmatrices, matrices)

    start = (jnp.zeros_like(x_ND, jnp.float32), jnp.zeros_like(weights_M))
    (dx_ND, dweights_M), dexperts = lax.scan(expert, start, (groups, expert_weights))
    return dx_ND.astype(x_ND.dtype), dweights_M.reshape(weights_NK.shape), None, dexperts


block_loop.defvjp(_forward, _backward)


def _sort_by_expert(experts_NK, experts):
    """Assignment ids (n K + k) ordered by expert, another device's last, and the (start, count) of each expert."""
    experts_M = experts_NK.reshape(-1)
    keys_M = jnp.where((experts_M >= 0) & (experts_M < experts), experts_M, experts)
    order_M = jnp.argsort(keys_M, stable=True)
    bounds = jnp.searchsorted(keys_M[order_M], jnp.arange(experts + 1))
    # Padded, so that the slice of a last, partial block never slides back over rows already done.
    return jnp.pad(order_M, (0, BLOCK)), (bounds[:-1], jnp.diff(bounds))


def _blocks(group):
    return (group[1] + BLOCK - 1) // BLOCK


def _block(order_M, group, index, shape_NK):
    """Assignment and token ids of a block; past the group's end out of range: read as 0, dropped on writing."""
    start, count = group
    tokens, experts_per_token = shape_NK
    rows = lax.dynamic_slice_in_dim(order_M, start + index * BLOCK, BLOCK)
    rows = jnp.where(index * BLOCK + jnp.arange(BLOCK) < count, rows, tokens * experts_per_token)
    return rows, rows // experts_per_token


def _take(array, indices):
    return array.at[indices].get(mode="fill", fill_value=0)


def _swiglu(x_RD, weights_R, matrices):
    """One expert on a block of rows. Weighing the hidden rows gives d(weights) without the down projection's output."""
    w_gate_DF, w_up_DF, w_down_FD = matrices
    gate_RF = jnp.matmul(x_RD, w_gate_DF, preferred_element_type=jnp.float32)
    up_RF = jnp.matmul(x_RD, w_up_DF, preferred_element_type=jnp.float32)
    hidden_RF = (jax.nn.silu(gate_RF) * up_RF * weights_R[:, None]).astype(x_RD.dtype)
    return jnp.matmul(hidden_RF, w_down_FD, preferred_element_type=jnp.float32)
