"""The gradient that the pass over experts computes is the derivative of the penalty."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc import erc_loss, sharding
from moe_erc.losses import erc, hinges, responses
from tests.tolerance import assert_close

L, E, D, F = 2, 8, 6, 4
TERMS = 2 * (D + F) + E * E  # sums over D and F, forward and backward, and over pairs
OPTIONS = (
    {},
    {"noise": "expected"},
    {"noise": "expected", "normalize": True, "activation": "up"},
    {"activation": "silu_gate"},
    {"activation": "output"},
)
ALPHA = 0.9


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = {
        "router": (L, E, D),
        "w_gate": (L, E, D, F),
        "w_up": (L, E, D, F),
        "w_down": (L, E, F, D),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def value_and_grad(params, mesh=None, **options):
    """Loss, and its gradient to the parameters and to alpha, compiled."""

    def loss(params, alpha):
        return erc_loss(params, jax.random.key(0), alpha=alpha, mesh=mesh, **options)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, ALPHA)


def differentiated(matrix, proxies, length_LE, weights, alpha):
    """`penalty_of` without a gradient of its own."""
    return hinges.penalty(matrix.columns(proxies, length_LE, weights), alpha, matrix.devices)


@pytest.mark.parametrize("shape", [None, (2, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_gradient_is_that_of_the_penalty(params, options, shape):
    with mock.patch.object(erc, "penalty_of", differentiated):
        expected = value_and_grad(params, **options)
    mesh = None if shape is None else sharding.make_mesh(*shape)
    found = value_and_grad(params, mesh, **options)
    assert found[0] > 0
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    assert_close(found, expected, TERMS, largest=largest)


@pytest.mark.parametrize("shape", [None, (2, 2)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_several_experts_in_a_turn_give_the_same(params, options, shape):
    mesh = None if shape is None else sharding.make_mesh(*shape)
    with mock.patch.object(responses, "COLUMNS", 1):
        one_by_one = value_and_grad(params, mesh, **options)
    with mock.patch.object(responses, "COLUMNS", 2 * F):
        by_two = value_and_grad(params, mesh, **options)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(one_by_one))
    assert_close(by_two, one_by_one, TERMS, largest=largest)


def test_a_turn_off_the_cpu_has_as_many_experts_as_its_memory_holds():
    # The rows and the responses of an expert are (E, D) and (E, F) in float32.
    response = responses.Response("gate", "high")
    proxies = responses.Proxies(jax.ShapeDtypeStruct((L, E, D), jnp.float32))
    weights = {"w_gate": np.zeros((L, E, D, F), np.float32)}
    of_expert = 4 * E * (D + F)
    for bytes_of_turn, experts in ((of_expert, 1), (4 * of_expert, 4), (100 * of_expert, E)):
        with mock.patch.object(responses, "GROUP_BYTES", bytes_of_turn):
            _, place_GB, _ = responses.groups(response, proxies, weights, "gpu")
        assert place_GB.shape == (L * E // experts, experts)
        np.testing.assert_array_equal(place_GB.reshape(L, E), [range(E)] * L)


def test_every_layer_has_the_factor_that_arrives_for_it(params):
    layer = {name: leaf[0] for name, leaf in params.items()}
    alike = {name: jnp.stack([leaf, leaf]) for name, leaf in layer.items()}
    options = {"noise": "none", "layer_reduction": "sum"}
    of_layer = value_and_grad(layer, **options)
    (loss, (gradients, of_alpha)) = value_and_grad(alike, **options)
    assert_close((loss, of_alpha), (2 * of_layer[0], 2 * of_layer[1][1]), TERMS)
    mean_of_both, _ = value_and_grad(alike, noise="none")
    assert_close(mean_of_both, of_layer[0], TERMS)
    for name in ("router", "w_gate"):
        expected = jnp.stack([of_layer[1][0][name]] * 2)
        assert_close(gradients[name], expected, TERMS)
