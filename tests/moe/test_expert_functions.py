"""What experts compute per row, by every implementation, against formulas on gathered matrices.

The tests also show where gradients stop.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from moe_erc.moe.experts import IMPLEMENTATIONS, affinity, unit_output, weighed
from tests.tolerance import assert_close

N, K, E, D, F, RANK = 70, 3, 4, 6, 5, 3  # 70 rows for one expert are more than a block
KEEPS = (("whole", ("hidden",)), ("whole", ("output",)), ("factorised", ("hidden", "output")))
EVERY_WAY = pytest.mark.parametrize("name", sorted(set(IMPLEMENTATIONS) - {"tokamax"}))


@cache
def inputs(gate, every=False):
    """x, what is assigned, ids (-1: another device's expert, E: an empty slot) and matrices."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    x_ND = jax.random.normal(next(keys), (N, D))
    experts_NK = lax.top_k(jax.random.normal(next(keys), (N, E + 2)), K)[1] - 1
    experts_NK = jnp.broadcast_to(jnp.arange(E), (N, E)) if every else experts_NK.at[:, 0].set(2)
    experts_NK = (
        experts_NK
        if every
        else experts_NK.at[:, 1:].set(jnp.where(experts_NK == 2, E, experts_NK)[:, 1:])
    )
    assigned = {"weight": jax.random.uniform(next(keys), experts_NK.shape)}
    shapes = {"w_gate": (E, D, F), "w_up": (E, D, F), "w_down": (E, F, D)}
    if gate == "factorised":
        assigned["low"] = jax.random.normal(next(keys), (*experts_NK.shape, RANK))
        shapes = {"w_high": (E, RANK, F)} | {name: shapes[name] for name in ("w_up", "w_down")}
    matrices = {name: 0.5 * jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    return x_ND, assigned, experts_NK, matrices


def by_formula(x_ND, assigned, experts_NK, matrices):
    """(mine, hidden, output) of every assignment, each with its own expert's matrices."""
    mine_NK1 = ((experts_NK >= 0) & (experts_NK < E))[..., None]
    own = {name: leaf[jnp.clip(experts_NK, 0, E - 1)] for name, leaf in matrices.items()}
    if "low" in assigned:
        gate_NKF = jnp.einsum("nkr,nkrf->nkf", assigned["low"], own["w_high"])
    else:
        gate_NKF = jnp.einsum("nd,nkdf->nkf", x_ND, own["w_gate"])
    hidden_NKF = gate_NKF / (1 + jnp.exp(-gate_NKF)) * jnp.einsum("nd,nkdf->nkf", x_ND, own["w_up"])
    output_NKD = jnp.einsum("nkf,nkfd->nkd", hidden_NKF, own["w_down"])
    return mine_NK1, jnp.where(mine_NK1, hidden_NKF, 0), jnp.where(mine_NK1, output_NKD, 0)


def weighed_by_formula(keep, x_ND, assigned, experts_NK, matrices):
    _, hidden_NKF, output_NKD = by_formula(x_ND, assigned, experts_NK, matrices)
    summed_ND = jnp.sum(assigned["weight"][..., None] * output_NKD, axis=1)
    constant = jax.tree.map(lax.stop_gradient, (x_ND, assigned))
    kept = {"hidden": hidden_NKF, "output": by_formula(*constant, experts_NK, matrices)[2]}
    return summed_ND, {name: kept[name] for name in keep}


WEIGHED_BY_FORMULA = {keep: partial(weighed_by_formula, keep) for _, keep in KEEPS}


def affinity_by_formula(x_ND, assigned, experts_NK, matrices):
    mine_NK1, _, output_NKD = by_formula(x_ND, assigned, experts_NK, matrices)
    return (), jnp.where(mine_NK1[..., 0], jnp.mean(jnp.log1p(jnp.exp(output_NKD)), axis=-1), 0)


def unit_output_by_formula(x_ND, assigned, experts_NK, matrices):
    mine_NK1, _, output_NKD = by_formula(x_ND, assigned, experts_NK, matrices)
    unit_NKD = output_NKD / jnp.sqrt(
        jnp.sum(jnp.where(mine_NK1, output_NKD, 1) ** 2, axis=-1, keepdims=True)
    )
    return jnp.sum(assigned["weight"][..., None] * unit_NKD, axis=1), ()


def value_and_gradients(run, arguments):
    x_ND, assigned, experts_NK, matrices = arguments

    def loss(x_ND, assigned, matrices):
        results = run(x_ND, assigned, experts_NK, matrices)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(results)), results

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
        x_ND, assigned, matrices
    )


@cache
def expected_of(formula, gate, every=False):
    """The expected results, computed once for all implementations."""
    return value_and_gradients(formula, inputs(gate, every))


def assert_equal(expected, found):
    # Gradients of matrices are sums over at most N K rows. Their terms are sums over D, F and D,
    # forward and backward.
    assert_close(found, expected, terms=N * K + 2 * (2 * D + F))


@pytest.mark.parametrize("gate, keep", KEEPS, ids=str)
@EVERY_WAY
def test_weighed_outputs_and_what_is_kept(name, gate, keep):
    run = partial(IMPLEMENTATIONS[name], partial(weighed, keep=keep))
    assert_equal(
        expected_of(WEIGHED_BY_FORMULA[keep], gate), value_and_gradients(run, inputs(gate))
    )


@EVERY_WAY
def test_affinity_of_all_experts(name):
    found = value_and_gradients(
        partial(IMPLEMENTATIONS[name], affinity), inputs("whole", every=True)
    )
    assert_equal(expected_of(affinity_by_formula, "whole", every=True), found)


@EVERY_WAY
def test_directions_of_outputs_are_weighed_and_summed(name):
    found = value_and_gradients(partial(IMPLEMENTATIONS[name], unit_output), inputs("factorised"))
    assert_equal(expected_of(unit_output_by_formula, "factorised"), found)


@EVERY_WAY
def test_an_output_of_zero_has_no_direction_and_no_gradient(name):
    x_ND, assigned, experts_NK, matrices = inputs("whole")
    found = value_and_gradients(
        partial(IMPLEMENTATIONS[name], unit_output), (0 * x_ND, assigned, experts_NK, matrices)
    )
    assert not any(leaf.any() for leaf in jax.tree.leaves(found))  # NaN would be any


@EVERY_WAY
def test_a_loss_on_kept_outputs_trains_the_experts_alone(name):
    def kept_output(*arguments):
        return IMPLEMENTATIONS[name](partial(weighed, keep=("output",)), *arguments)[1]

    _, (dx_ND, dassigned, dmatrices) = value_and_gradients(kept_output, inputs("factorised"))
    assert not dx_ND.any() and not any(leaf.any() for leaf in dassigned.values())
    assert all(leaf.any() for leaf in dmatrices.values())


@EVERY_WAY
def test_mixed_precision_keeps_dtypes(name):
    x_ND, assigned, experts_NK, matrices = inputs("factorised")
    x_ND, low, matrices = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), (x_ND, assigned["low"], matrices)
    )
    assigned = assigned | {"low": low}  # routing weights stay float32
    run = partial(IMPLEMENTATIONS[name], partial(weighed, keep=("hidden", "output")))
    (_, results), gradients = value_and_gradients(run, (x_ND, assigned, experts_NK, matrices))
    assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {jnp.dtype(jnp.bfloat16)}
    types = jax.tree.map(lambda leaf: leaf.dtype, ((x_ND, assigned, matrices), gradients))
    assert types[0] == types[1]
    assert all(
        jnp.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves((results, gradients))
    )
