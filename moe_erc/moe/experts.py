"""SwiGLU experts applied to the tokens routed to them, in ways that compute the same.

    y_n = sum_k weight_nk (silu(gate_nk) * (x_n @ w_up[e])) @ w_down[e],   e = expert_nk
    gate_nk = x_n @ w_gate[e],  or  low_nk @ w_high[e]  of a gate factorised as w_low[e] @ w_high[e]

What happens to a row is a function of `expert(x, assigned, matrices, matmul) -> (summed, kept)`,
written once: `summed` is added up by token, `kept` stays by assignment. `dense` runs it on every
expert and token: the oracle. `block_loop` walks blocks of rows of one expert: portable, and the
fastest on CPU. `grouped` multiplies rows of all experts at once, by a matmul of TPUs or of GPUs.
All are dropless; an expert id outside [0, E) is another device's, or nobody's, and contributes
nothing.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.checks import BadInput
from moe_erc.moe import self_test
from moe_erc.moe.block_loop import MATMUL, block_loop
from moe_erc.moe.grouped import grouped
from moe_erc.moe.grouped_matmul import grouped_matmul, tokamax_matmul
from moe_erc.numerics import unit

GATED = ("w_gate", "w_up", "w_down")
FACTORIZED = ("w_high", "w_up", "w_down")
LOG = logging.getLogger(__name__)


def hidden(x: jax.Array, assigned: Mapping, matrices: Mapping, matmul: Callable) -> jax.Array:
    """The activations that the down projection reads, not weighed."""
    gate = (
        matmul(assigned["low"], matrices["w_high"])
        if "low" in assigned
        else matmul(x, matrices["w_gate"])
    )
    return jax.nn.silu(gate) * matmul(x, matrices["w_up"])


def output(x: jax.Array, assigned: Mapping, matrices: Mapping, matmul: Callable) -> jax.Array:
    """What an expert answers, not weighed."""
    return matmul(hidden(x, assigned, matrices, matmul).astype(x.dtype), matrices["w_down"])


def weighed(
    x: jax.Array, assigned: Mapping, matrices: Mapping, matmul: Callable, keep: Sequence[str] = ()
) -> tuple[jax.Array, dict]:
    """The weighed output, summed by token. Weighing the hidden rows spares the backward the down projection.

    `keep` may name "hidden", and "output", which is constant in the token: its gradient reaches the
    experts alone. The first factor of a gate is applied before: `assigned` may hold its
    "low_of_constant" tokens, to reach it as well.
    """
    kept = {}
    hidden_RF = hidden(x, assigned, matrices, matmul)
    if "hidden" in keep:
        kept["hidden"] = hidden_RF.astype(x.dtype)
    if "output" in keep:
        constant = jax.tree.map(lax.stop_gradient, (x, assigned))
        if "low_of_constant" in assigned:
            constant[1]["low"] = assigned["low_of_constant"]
        kept["output"] = output(*constant, matrices, matmul).astype(x.dtype)
    hidden_RF *= assigned["weight"][:, None]
    return matmul(hidden_RF.astype(x.dtype), matrices["w_down"]), kept


def affinity(x: jax.Array, assigned: Mapping, matrices: Mapping, matmul: Callable) -> tuple:
    """How strongly an expert answers: the mean softplus of its output, by assignment."""
    return (), jnp.mean(
        jax.nn.softplus(output(x, assigned, matrices, matmul).astype(jnp.float32)), axis=-1
    )


def unit_output(x: jax.Array, assigned: Mapping, matrices: Mapping, matmul: Callable) -> tuple:
    """The direction of an expert's output, weighed and summed by token.

    0, as its gradient, for an output of 0.
    """
    return assigned["weight"][:, None] * unit(
        output(x, assigned, matrices, matmul).astype(jnp.float32)
    ), ()


def dense(
    expert: Callable, x_ND: jax.Array, assigned: Any, experts_NK: jax.Array, matrices: Mapping
) -> tuple[Any, Any]:
    """Every expert on every token, weighed by 0 where it was not chosen: E / K times the work, nothing to get wrong."""

    def choose(chosen_NK, leaf):
        return jnp.where(chosen_NK.reshape(*chosen_NK.shape, *(1,) * (leaf.ndim - 2)), leaf, 0)

    def run(expert_and_matrices):
        number, of_expert = expert_and_matrices
        chosen_NK = experts_NK == number
        own = jax.tree.map(lambda leaf: jnp.sum(choose(chosen_NK, leaf), axis=1), assigned)
        summed, kept = expert(x_ND, own, of_expert, MATMUL)
        return summed, jax.tree.map(lambda leaf: choose(chosen_NK, leaf[:, None]), kept)

    def add(total, expert_and_matrices):
        return jax.tree.map(
            lambda so_far, leaf: so_far + leaf, total, run(expert_and_matrices)
        ), None

    numbered = (jnp.arange(len(matrices["w_down"])), matrices)
    shapes = jax.eval_shape(run, jax.tree.map(lambda leaf: leaf[0], numbered))
    start = jax.tree.map(lambda leaf: jnp.zeros_like(x_ND, leaf.dtype, shape=leaf.shape), shapes)
    summed, kept = lax.scan(add, start, numbered)[0]
    return _in_dtype_of(x_ND, summed), kept


def _in_dtype_of(x, tree):
    return jax.tree.map(lambda leaf: leaf.astype(x.dtype), tree)


def pallas_matmul(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Imported when used: in a jax without Pallas's Triton backend it fails its self-test, and nothing else does."""
    from moe_erc.moe import pallas_matmul as kernels

    return kernels.pallas_matmul(x_MD, w_EDF, sizes_E)


MATMULS = {"ragged": grouped_matmul, "pallas": pallas_matmul, "tokamax": tokamax_matmul}
IMPLEMENTATIONS = {"dense": dense, "block_loop": block_loop}
IMPLEMENTATIONS |= {name: partial(grouped, matmul) for name, matmul in MATMULS.items()}
FASTEST = {"cpu": "block_loop", "gpu": "pallas", "tpu": "ragged"}
PORTABLE = "block_loop"


def implementation(name: str, platform: str) -> Callable:
    """The function called `name`; for "auto" the fastest on `platform` (cpu, gpu or tpu) that is right on its devices.

    Which is asked of grouped matmuls. One that was called by its name and is wrong is refused.
    """
    chosen = FASTEST[platform] if name == "auto" else name
    refusal = self_test.refusal(MATMULS[chosen], platform) if chosen in MATMULS else None
    if refusal and name != "auto":
        raise BadInput(
            f"model.experts_implementation: {name!r} fails its self-test on {platform}: {refusal}; use 'auto'"
        )
    if refusal:
        LOG.warning(
            "experts: %s fails its self-test on %s, %s is used instead: %s",
            chosen,
            platform,
            PORTABLE,
            refusal,
        )
        chosen = PORTABLE
    return IMPLEMENTATIONS[chosen]
