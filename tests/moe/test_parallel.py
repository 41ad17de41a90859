"""Experts on a mesh compute what one device computes: outputs and every gradient.

This holds also where all tokens meet one expert.
"""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_erc import sharding
from moe_erc.moe import parallel
from moe_erc.moe.experts import FACTORIZED, GATED, IMPLEMENTATIONS, dense, weighed
from moe_erc.moe.routers.aoe import BY_EXPERT
from moe_erc.moe.routing import Routing
from tests.tolerance import assert_close

B, T, K, E, D, F, RANK = 8, 6, 2, 8, 16, 8, 4
KEEP = ("hidden", "output")
# Gradients of matrices are sums over all assignments. Their terms are sums over D, F and D, forward
# and backward.
TERMS = B * T * K + 2 * (2 * D + F)


def arguments(spread, names):
    """x, routing, matrices and, beside a factorised gate, its first factor."""
    keys = jax.random.split(jax.random.key(0), 6)
    weights_BTK, experts_BTK = jax.lax.top_k(jax.random.uniform(keys[0], (B, T, E)), K)
    experts_BTK = {
        "random": experts_BTK,
        "one expert": jnp.full_like(experts_BTK, 5),
        "empty slots": jnp.where(weights_BTK > 0.8, experts_BTK, E),
    }[spread]
    shapes = {"w_gate": (E, D, F), "w_high": (E, RANK, F), "w_up": (E, D, F), "w_down": (E, F, D)}
    matrices = {
        name: 0.3 * jax.random.normal(key, shapes[name])
        for name, key in zip(names, keys[1:4], strict=True)
    }
    w_low_EDr = jax.random.normal(keys[5], (E, D, RANK)) if "w_high" in names else None
    return (
        jax.random.normal(keys[4], (B, T, D)),
        Routing(weights_BTK, experts_BTK),
        matrices,
        w_low_EDr,
    )


def run(mesh, implementation, spread, names, keep):
    x_BTD, routing, matrices, w_low_EDr = arguments(spread, names)
    gradients = gradients_of(mesh, implementation, keep)
    return jax.device_get(
        gradients(x_BTD, routing.weights_BTK, matrices, w_low_EDr, routing.experts_BTK)
    )


@cache
def gradients_of(mesh, implementation, keep):
    """Gradients by one program for all routings."""

    def loss(x_BTD, weights_BTK, matrices, w_low_EDr, experts_BTK):
        low_BTEr = (
            None if w_low_EDr is None else parallel.project(mesh, x_BTD, w_low_EDr, BY_EXPERT)
        )
        of_experts = partial(implementation, partial(weighed, keep=keep))
        results = parallel.apply(
            of_experts, mesh, x_BTD, Routing(weights_BTK, experts_BTK), matrices, low_BTEr
        )
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(results)), results

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))


@cache
def oracle(spread, names, keep):
    return run(None, dense, spread, names, keep)


@pytest.mark.parametrize("shape", [(1, 8), (2, 4)], ids=str)
def test_memory_is_bounded_by_a_groups_tokens_and_knows_no_routing(shape):
    mesh, (rows, length, chosen), (experts, width, hidden) = (
        sharding.make_mesh(*shape),
        (8, 64, 4),
        (16, 64, 32),
    )

    def abstract(of, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(of, dtype, sharding=NamedSharding(mesh, spec))

    def loss(x_BTD, routing, matrices):
        of_experts = partial(IMPLEMENTATIONS["block_loop"], weighed)
        return jnp.sum(parallel.apply(of_experts, mesh, x_BTD, routing, matrices)[0] ** 2)

    x_BTD = abstract((rows, length, width), P(sharding.BATCH))
    routing = Routing(
        *(
            abstract((rows, length, chosen), P(sharding.BATCH), of)
            for of in (jnp.float32, jnp.int32)
        )
    )
    up, down = (experts, width, hidden), (experts, hidden, width)
    shapes = {"w_gate": up, "w_up": up, "w_down": down}
    matrices = {name: abstract(of, sharding.PARAMETERS[name]) for name, of in shapes.items()}
    gradients = jax.jit(jax.grad(loss, argnums=(0, 2))).lower(x_BTD, routing, matrices).compile()
    # Gathered tokens, outputs and their gradients, and the device's experts with their gradients.
    # Buffers with room for every token at each of the device's 2 or 4 experts would take 2 or 4
    # times the tokens in addition.
    of_group, of_experts = (
        4 * rows * length * width // shape[0],
        4 * 3 * experts * width * hidden // shape[1],
    )
    assert gradients.memory_analysis().temp_size_in_bytes < 5 * of_group + 2 * of_experts


@pytest.mark.parametrize("spread", ["random", "one expert"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2), (1, 8)], ids=str)
def test_any_mesh_equals_the_oracle_on_one_device(shape, spread):
    expected = oracle(spread, GATED, ())
    found = run(sharding.make_mesh(*shape), IMPLEMENTATIONS["block_loop"], spread, GATED, ())
    assert_close(found, expected, TERMS)


@pytest.mark.parametrize("shape, name", [((2, 2), "block_loop"), ((1, 4), "ragged")], ids=str)
def test_factorised_gates_empty_slots_and_what_is_kept_on_any_mesh(shape, name):
    expected = oracle("empty slots", FACTORIZED, KEEP)
    found = run(sharding.make_mesh(*shape), IMPLEMENTATIONS[name], "empty slots", FACTORIZED, KEEP)
    (_, (_, kept)), (*_, dw_low_EDr) = found
    assert kept["hidden"].shape == (B, T, K, F) and kept["output"].shape == (B, T, K, D)
    assert dw_low_EDr.any()
    assert_close(found, expected, TERMS)


@pytest.mark.parametrize("spread", ["empty slots", "one expert"])
@pytest.mark.parametrize("name", ["pallas", "megablox"])
def test_interpreted_kernels_on_a_mesh(name, spread):
    expected = oracle(spread, GATED, ())
    found = run(sharding.make_mesh(2, 2), IMPLEMENTATIONS[name], spread, GATED, ())
    assert_close(found, expected, TERMS)


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)], ids=str)
def test_kernels_without_the_replication_check_are_summed_once(shape):
    """Every gradient on eight devices is that of one: no sum is missing, none is taken twice."""
    expected = oracle("random", GATED, ())
    found = run(sharding.make_mesh(*shape), IMPLEMENTATIONS["megablox"], "random", GATED, ())
    assert_close(found, expected, TERMS)


def abstract_layer(mesh):
    """x, routing and matrices as shapes, where they lie on the mesh."""

    def abstract(of, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(of, dtype, sharding=NamedSharding(mesh, spec))

    tokens = P(sharding.BATCH)
    routing = Routing(abstract((B, T, K), tokens), abstract((B, T, K), tokens, jnp.int32))
    shapes = {"w_gate": (E, D, F), "w_up": (E, D, F), "w_down": (E, F, D)}
    matrices = {name: abstract(of, sharding.PARAMETERS[name]) for name, of in shapes.items()}
    return abstract((B, T, D), tokens), routing, matrices


@pytest.mark.parametrize("lines", [None, 2])
def test_gradients_of_experts_are_reduce_scattered(monkeypatch, lines):
    """The program has a reduce-scatter a stage and matrix, and no all-reduce of their size."""
    mesh = sharding.make_mesh(8, 1)
    stages = (None,) if lines is None else sharding.in_two_stages(8, lines)
    monkeypatch.setattr(parallel, "scatter_stages", lambda mesh: stages)

    def loss(x_BTD, routing, matrices):
        of_experts = partial(IMPLEMENTATIONS["block_loop"], weighed)
        return jnp.sum(parallel.apply(of_experts, mesh, x_BTD, routing, matrices)[0] ** 2)

    text = jax.jit(jax.grad(loss, argnums=2)).lower(*abstract_layer(mesh)).compile().as_text()
    found = re.findall(r"= (\S+) (reduce-scatter|all-reduce|all-to-all)\(", text)
    assert [kind for _, kind in found] == ["reduce-scatter"] * 3 * len(stages)
    whole = r"f32\[8,(?:16,8|8,16)\]\S* all-gather\("
    assert len(re.findall(whole, text)) == 3


@pytest.mark.parametrize("line", [2, 4])
def test_two_stages_of_a_sum_are_one(monkeypatch, line):
    expected = oracle("random", GATED, ())
    monkeypatch.setattr(parallel, "scatter_stages", lambda mesh: sharding.in_two_stages(8, line))
    gradients_of.cache_clear()
    found = run(sharding.make_mesh(8, 1), IMPLEMENTATIONS["block_loop"], "random", GATED, ())
    gradients_of.cache_clear()
    assert_close(found, expected, TERMS)
