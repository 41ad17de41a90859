"""SwiGLU experts applied to the tokens routed to them, in three ways that compute the same sum.

    y_n = sum_k weight_nk (silu(x_n @ w_gate[e]) * (x_n @ w_up[e])) @ w_down[e],   e = expert_nk

`dense` runs every expert on every token: the oracle. `ragged` sorts assignments by expert and multiplies the groups,
native on TPU. `block_loop` (own file) walks blocks of rows in place: portable, and the fastest on CPU. All are
dropless; an expert id outside [0, E) is another device's and contributes nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.moe.block_loop import block_loop
from moe_erc.moe.grouped_matmul import grouped_matmul


class ExpertWeights(NamedTuple):
    """The three matrices of every expert."""

    w_gate_EDF: jax.Array
    w_up_EDF: jax.Array
    w_down_EFD: jax.Array


def dense(x_ND, weights_NK, experts_NK, expert_weights):
    """Every expert on every token, weighed by 0 where it was not chosen: E / K times the work, nothing to get wrong."""

    def add_expert(y_ND, expert_and_weights):
        expert, (w_gate_DF, w_up_DF, w_down_FD) = expert_and_weights
        hidden_NF = jax.nn.silu(x_ND @ w_gate_DF) * (x_ND @ w_up_DF)
        weight_N1 = jnp.sum(jnp.where(experts_NK == expert, weights_NK, 0), axis=-1, keepdims=True)
        return y_ND + weight_N1 * (hidden_NF @ w_down_FD).astype(jnp.float32), None

    ids_E = jnp.arange(len(expert_weights.w_gate_EDF))
    zeros_ND = jnp.zeros_like(x_ND, jnp.float32)
    return lax.scan(add_expert, zeros_ND, (ids_E, expert_weights))[0].astype(x_ND.dtype)


def ragged(x_ND, weights_NK, experts_NK, expert_weights):
    """Assignments sorted by expert, then three grouped matmuls; groups may be empty, nothing is padded or dropped."""
    experts, experts_per_token = len(expert_weights.w_gate_EDF), experts_NK.shape[-1]
    experts_M = experts_NK.reshape(-1)
    local_M = (experts_M >= 0) & (experts_M < experts)
    order_M = jnp.argsort(jnp.where(local_M, experts_M, experts), stable=True)
    sizes_E = jnp.sum(experts_M[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)

    w_gate_EDF, w_up_EDF, w_down_EFD = expert_weights
    tokens_M = order_M // experts_per_token
    x_MD = x_ND[tokens_M]
    hidden_MF = jax.nn.silu(grouped_matmul(x_MD, w_gate_EDF, sizes_E)) * grouped_matmul(x_MD, w_up_EDF, sizes_E)
    out_MD = grouped_matmul(hidden_MF, w_down_EFD, sizes_E) * weights_NK.reshape(-1)[order_M, None]
    return jnp.zeros_like(x_ND, jnp.float32).at[tokens_M].add(out_MD).astype(x_ND.dtype)


IMPLEMENTATIONS = {"dense": dense, "block_loop": block_loop, "ragged": ragged}
FASTEST = {"cpu": "block_loop", "gpu": "block_loop", "tpu": "ragged"}


def implementation(name, platform):
    """The function called `name`; for "auto" the fastest correct one on `platform`: cpu, gpu or tpu."""
    return IMPLEMENTATIONS[FASTEST[platform] if name == "auto" else name]
