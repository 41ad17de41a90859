"""SwiGLU experts applied to the tokens routed to them, in ways that compute the same.

    y_n = sum_k weight_nk (silu(gate_nk) * (x_n @ w_up[e])) @ w_down[e],   e = expert_nk
    gate_nk = x_n @ w_gate[e],  or  low_nk @ w_high[e]  of a gate factorised as w_low[e] @ w_high[e]

What an expert does to a row is written once, as a function

    expert(x, assigned, matrices, matmul) -> (summed, kept)

    x         (R, D), the rows of the tokens
    assigned  {name: (R, …)}, what belongs to the assignment, such as its "weight"
    matrices  {name: matrix} of the expert, or of all of them
    matmul    multiplies rows with the matrices of their experts
    summed    is added up by token
    kept      stays by assignment

The implementations apply it in different ways. `dense` runs it on every expert and token: the
oracle. `block_loop` walks blocks of rows of one expert: portable, and the fastest on CPU. `grouped`
multiplies the rows of all experts at once, by a matmul of TPUs or of GPUs. All are dropless. An
expert id outside [0, E) is another device's, or nobody's, and contributes nothing.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.checks import BadInput
from moe_erc.moe import self_test
from moe_erc.moe.block_loop import MATMUL, block_loop
from moe_erc.moe.grouped import grouped
from moe_erc.moe.grouped_matmul import grouped_matmul, tokamax_matmul
from moe_erc.moe.megablox_matmul import megablox_matmul
from moe_erc.numerics import unit

GATED = ("w_gate", "w_up", "w_down")
FACTORIZED = ("w_high", "w_up", "w_down")
LOG = logging.getLogger(__name__)


def hidden(x: jax.Array, assigned: Mapping, matrices: Mapping, matmul: Callable) -> jax.Array:
    """The activations that the down projection reads, (R, F), not weighed."""
    if "low" in assigned:
        gate = matmul(assigned["low"], matrices["w_high"])
    else:
        gate = matmul(x, matrices["w_gate"])
    return jax.nn.silu(gate) * matmul(x, matrices["w_up"])


def output(x: jax.Array, assigned: Mapping, matrices: Mapping, matmul: Callable) -> jax.Array:
    """What an expert answers, (R, D), not weighed."""
    hidden_RF = hidden(x, assigned, matrices, matmul).astype(x.dtype)
    return matmul(hidden_RF, matrices["w_down"])


def weighed(
    x: jax.Array, assigned: Mapping, matrices: Mapping, matmul: Callable, keep: Sequence[str] = ()
) -> tuple[jax.Array, dict]:
    """The weighed output, summed by token; what `keep` names is kept by assignment.

    keep: "hidden", and "output". The kept output is constant in the token: its gradient reaches the
        experts alone. The first factor of a factorised gate has been applied before; to reach that
        factor as well, `assigned` holds "low_of_constant", its result for constant tokens.

    The hidden rows are weighed instead of the outputs: the backward pass then needs no outputs, and
    does not repeat the down projection.
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
    output_RD = output(x, assigned, matrices, matmul).astype(jnp.float32)
    return (), jnp.mean(jax.nn.softplus(output_RD), axis=-1)


def unit_output(x: jax.Array, assigned: Mapping, matrices: Mapping, matmul: Callable) -> tuple:
    """The direction of an expert's output, weighed and summed by token.

    For an output of 0 it is 0, and so is its gradient.
    """
    output_RD = output(x, assigned, matrices, matmul).astype(jnp.float32)
    return assigned["weight"][:, None] * unit(output_RD), ()


def dense(
    expert: Callable, x_ND: jax.Array, assigned: Any, experts_NK: jax.Array, matrices: Mapping
) -> tuple[Any, Any]:
    """(summed by token, kept by assignment), with every expert run on every token.

    An expert that was not chosen has weight 0. The work is E / K times what is needed; in return
    there is nothing to get wrong.
    """

    def choose(chosen_NK, leaf):
        mask = chosen_NK.reshape(*chosen_NK.shape, *(1,) * (leaf.ndim - 2))
        return jnp.where(mask, leaf, 0)

    def run(expert_and_matrices):
        number, of_expert = expert_and_matrices
        chosen_NK = experts_NK == number

        def of_token(leaf):
            return jnp.sum(choose(chosen_NK, leaf), axis=1)

        def of_assignment(leaf):
            return choose(chosen_NK, leaf[:, None])

        summed, kept = expert(x_ND, jax.tree.map(of_token, assigned), of_expert, MATMUL)
        return summed, jax.tree.map(of_assignment, kept)

    def add(total, expert_and_matrices):
        return jax.tree.map(jnp.add, total, run(expert_and_matrices)), None

    def first(leaf):
        return leaf[0]

    def zeros(leaf):
        return jnp.zeros(leaf.shape, leaf.dtype)

    def in_dtype_of_x(leaf):
        return leaf.astype(x_ND.dtype)

    numbered = (jnp.arange(len(matrices["w_down"])), matrices)
    shapes = jax.eval_shape(run, jax.tree.map(first, numbered))
    (summed, kept), _ = lax.scan(add, jax.tree.map(zeros, shapes), numbered)
    return jax.tree.map(in_dtype_of_x, summed), kept


def pallas_matmul(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The kernels of `pallas_matmul.py`, (M, F)."""
    # Imported when used: in a jax without Pallas's Triton backend this kernel fails its self-test,
    # and nothing else fails.
    from moe_erc.moe import pallas_matmul as kernels

    return kernels.pallas_matmul(x_MD, w_EDF, sizes_E)


MATMULS = {
    "ragged": grouped_matmul,
    "megablox": megablox_matmul,
    "pallas": pallas_matmul,
    "tokamax": tokamax_matmul,
}
IMPLEMENTATIONS = {"dense": dense, "block_loop": block_loop}
IMPLEMENTATIONS |= {name: partial(grouped, matmul) for name, matmul in MATMULS.items()}
# The fastest first. Where one fails its self-test, the next is used; the last one is not tested.
FASTEST = {
    "cpu": ("block_loop",),
    "gpu": ("pallas", "block_loop"),
    "tpu": ("megablox", "ragged", "block_loop"),
}


def implementation(name: str, platform: str) -> Callable:
    """The implementation called `name`; "auto" is the fastest on `platform` (cpu, gpu or tpu).

    Grouped matmuls are tested on the platform's devices first. Where one fails, "auto" takes the
    next with a warning, and BadInput refuses one that was called by its name.
    """
    if name == "auto":
        return IMPLEMENTATIONS[_fastest(platform)]
    refusal = self_test.refusal(MATMULS[name], platform) if name in MATMULS else None
    if refusal:
        raise BadInput(
            f"model.experts_implementation: {name!r} fails its self-test on {platform}: "
            f"{refusal}; use 'auto'"
        )
    return IMPLEMENTATIONS[name]


def _fastest(platform):
    candidates = FASTEST[platform]
    for chosen, slower in pairwise(candidates):
        refusal = self_test.refusal(MATMULS[chosen], platform)
        if not refusal:
            self_test.say_untimed("experts", chosen, platform)
            return chosen
        LOG.warning(
            "experts: %s fails its self-test on %s, %s is used instead: %s",
            chosen,
            platform,
            slower,
            refusal,
        )
    return candidates[-1]
