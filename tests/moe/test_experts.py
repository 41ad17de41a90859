"""Values and gradients of every implementation against the dense oracle, for any spread of tokens.

The oracle itself is checked by hand.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.moe import block_loop, experts
from moe_erc.moe.experts import GATED, IMPLEMENTATIONS, dense, weighed
from tests.tolerance import assert_close

FAST = ["block_loop", "ragged", "megablox", "pallas"]  # tokamax differs in its matmul alone
N, K, E, D, F = 300, 3, 5, 16, 8


@cache
def inputs(routing):
    keys = jax.random.split(jax.random.key(0), 6)
    x_ND, weights_NK = jax.random.normal(keys[0], (N, D)), jax.random.uniform(keys[1], (N, K))
    experts_NK = {
        "balanced": jnp.stack([(jnp.arange(N) + k) % E for k in range(K)], axis=1),
        "random": lax_top_k(jax.random.normal(keys[2], (N, E))),
        "one expert": jnp.full((N, K), 2),  # all 900 rows: several blocks, and four empty experts
        "two experts": jnp.where(jnp.arange(N * K).reshape(N, K) % 7 == 0, 0, 4),
        "another device's": jnp.where(jnp.arange(N * K).reshape(N, K) % 2 == 0, -1 - E, E + 3),
        "some another device's": lax_top_k(jax.random.normal(keys[2], (N, E + 4))) - 2,
    }[routing]
    shapes = ((E, D, F), (E, D, F), (E, F, D))
    matrices = (
        0.3 * jax.random.normal(key, shape) for key, shape in zip(keys[3:], shapes, strict=True)
    )
    return x_ND, weights_NK, jnp.int32(experts_NK), dict(zip(GATED, matrices, strict=True))


def lax_top_k(scores_NE):
    return jax.lax.top_k(scores_NE, K)[1]


def apply(implementation, x_ND, weights_NK, experts_NK, matrices):
    y_ND, kept = implementation(weighed, x_ND, {"weight": weights_NK}, experts_NK, matrices)
    assert kept == {}
    return y_ND


@cache
def applied(implementation):
    """The outputs of an implementation, by one program for all routings."""
    return jax.jit(partial(apply, implementation))


@cache
def gradients_of(implementation):
    """The gradients of an implementation, by one program for all routings."""

    def loss(x_ND, weights_NK, matrices, experts_NK):
        y_ND = apply(implementation, x_ND, weights_NK, experts_NK, matrices)
        return jnp.sum(jnp.sin(y_ND)), y_ND

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


@cache
def value_and_gradients(implementation, routing):
    x_ND, weights_NK, experts_NK, matrices = inputs(routing)
    return gradients_of(implementation)(x_ND, weights_NK, matrices, experts_NK)


def test_memory_of_the_block_loop_is_that_of_its_outputs():
    tokens, E, D, F = 4096, 64, 256, 128
    shapes = ((tokens, D), (tokens, 8), (tokens, 8), (E, D, F), (E, D, F), (E, F, D))
    x, weights, ids, *of_experts = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    ids = jax.ShapeDtypeStruct(ids.shape, jnp.int32)

    def loss(x_ND, weights_NK, experts_NK, matrices):
        return jnp.sum(apply(block_loop.block_loop, x_ND, weights_NK, experts_NK, matrices) ** 2)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 3)))
    compiled = gradient.lower(x, weights, ids, dict(zip(GATED, of_experts, strict=True))).compile()
    # y, dy and dx have 4.2 MB each. An (N K, F) buffer would have 16.8 MB, an (N K, D) one 33.6 MB.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * tokens * D * 4


def test_the_oracle_by_hand():
    # One token x = 2 with D = F = 1.
    # expert 0 is silu(2 * 1) * (2 * 3) * 1, expert 1 is silu(2 * -1) * (2 * 1) * 2
    values = {"w_gate": [1.0, -1.0], "w_up": [3.0, 1.0], "w_down": [1.0, 2.0]}
    matrices = {name: jnp.array(of_experts).reshape(2, 1, 1) for name, of_experts in values.items()}
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
    outputs = [silu(2.0) * 6, silu(-2.0) * 2 * 2]
    y_ND = apply(
        dense, jnp.array([[2.0]]), jnp.array([[0.75, 0.25]]), jnp.array([[1, 0]]), matrices
    )
    assert_close(y_ND, [[0.75 * outputs[1] + 0.25 * outputs[0]]], terms=8)


@pytest.mark.parametrize(
    "routing", ["balanced", "random", "one expert", "two experts", "some another device's"]
)
@pytest.mark.parametrize("name", FAST)
def test_values_and_gradients_equal_the_oracles(name, routing):
    expected, found = (
        value_and_gradients(dense, routing),
        value_and_gradients(IMPLEMENTATIONS[name], routing),
    )
    # Gradients of matrices are sums over at most N K rows. Their terms are sums over D, F and D,
    # forward and backward.
    assert_close(found, expected, terms=N * K + 2 * (2 * D + F))


@pytest.mark.parametrize("name", ["dense", *FAST])
def test_tokens_of_other_devices_give_exactly_nothing(name):
    (_, y_ND), gradients = value_and_gradients(IMPLEMENTATIONS[name], "another device's")
    assert not y_ND.any()
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("name", FAST)
def test_an_empty_expert_gets_exactly_no_gradient(name):
    gradients = value_and_gradients(IMPLEMENTATIONS[name], "two experts")[1][2]
    assert not any(leaf[1:4].any() for leaf in gradients.values())
    assert all(leaf[0].any() and leaf[4].any() for leaf in gradients.values())


@pytest.mark.parametrize(
    "rows", [1, *range(block_loop.SMALLEST - 1, block_loop.SMALLEST + 2), 127, 128, 129, N]
)
def test_block_loop_at_the_edges_of_a_block(rows):
    x_ND, weights_NK, _, matrices = inputs("random")
    experts_NK = jnp.where(jnp.arange(N) < rows, 1, 3)[:, None]
    arguments = (x_ND, weights_NK[:, :1], experts_NK, matrices)
    found, expected = applied(block_loop.block_loop)(*arguments), applied(dense)(*arguments)
    assert_close(found, expected, terms=2 * D + F)


@pytest.mark.parametrize("name", ["dense", *FAST])
def test_bfloat16_stays_near_float32(name):
    x_ND, weights_NK, experts_NK, matrices = inputs("random")
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (x_ND, matrices))
    found = applied(IMPLEMENTATIONS[name])(low[0], weights_NK, experts_NK, low[1])
    expected = applied(dense)(x_ND, weights_NK, experts_NK, matrices)
    assert found.dtype == jnp.bfloat16
    # bfloat16 has 8 bits of mantissa.
    assert np.linalg.norm(found.astype(jnp.float32) - expected) < 0.02 * np.linalg.norm(expected)


def test_the_name_auto_is_the_fastest_of_the_platform():
    assert experts.implementation("auto", "tpu") is IMPLEMENTATIONS["megablox"]
    assert experts.implementation("auto", "gpu") is IMPLEMENTATIONS["pallas"]
    assert experts.implementation("auto", "cpu") is IMPLEMENTATIONS["block_loop"]
    assert experts.implementation("dense", "tpu") is dense
