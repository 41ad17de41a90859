"""One power step by hand: what it keeps, what it ignores, where its gradient goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tolerance import assert_close


@pytest.fixture
def config(model_config):
    return model_config(router="mpi", experts=2, experts_per_token=1, scale=4.0)


def rows(config, parameters):
    return config.router.rows(config, parameters)


def score(config, mesh, parameters, x_BTD):
    return config.router.score(config, mesh, parameters, x_BTD)


def random_parameters():
    keys = jax.random.split(jax.random.key(0))
    return {
        "router": jax.random.normal(keys[0], (2, 4)),
        "w_gate": jax.random.normal(keys[1], (2, 4, 6)),
    }


def test_a_power_step_by_hand(config):
    parameters = {
        "router": jnp.array([[1.0, 0.0], [0.0, 1.0]]),
        "w_gate": jnp.array([[[1.0, 1.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 3.0]]]),
    }
    # (1, 0) @ w = (1, 1), and @ w.T = (1 + 1, 0 + 1) = (2, 1) of length sqrt 5
    # (0, 1) @ w = (0, 3), and @ w.T = (0, 9)
    length = 4 / np.sqrt(2)
    expected_ED = length * np.array([[2 / np.sqrt(5), 1 / np.sqrt(5)], [0, 1]])
    assert_close(rows(config, parameters), expected_ED, terms=8)
    logits_BTE = score(config, None, parameters, jnp.array([[[1.0, 0.0], [1.0, 1.0]]])).logits_BTE
    expected_BTE = [[[length * 2 / np.sqrt(5), 0], [length * 3 / np.sqrt(5), length]]]
    assert_close(logits_BTE, expected_BTE, terms=8)


def test_a_gate_that_answers_to_all_directions_alike_keeps_the_rows_direction(config):
    router_ED = random_parameters()["router"]
    w_gate_EDF = jnp.array([3.0, 0.5])[:, None, None] * jnp.eye(4, 6)
    found_ED = rows(config, {"router": router_ED, "w_gate": w_gate_EDF})
    expected_ED = 4 / np.sqrt(2) * router_ED / np.linalg.norm(router_ED, axis=-1, keepdims=True)
    # Roundings: a power step over 6 and 4, norms and quotients.
    assert_close(found_ED, expected_ED, terms=6 + 4 + 16)


def test_scaling_router_or_gates_changes_nothing(config):
    parameters = random_parameters()
    scale_E = jnp.array([0.01, 30.0])
    scaled = {
        "router": parameters["router"] * scale_E[:, None],
        "w_gate": parameters["w_gate"] * scale_E[:, None, None],
    }
    expected_ED = rows(config, parameters)
    assert_close(np.linalg.norm(expected_ED, axis=-1), 4 / np.sqrt(2), terms=8)
    for name in parameters:
        assert_close(rows(config, parameters | {name: scaled[name]}), expected_ED, terms=6 + 4 + 16)


def test_the_gradient_reaches_router_and_gates(config):
    x_BTD = jax.random.normal(jax.random.key(1), (1, 5, 4))
    loss = jax.jit(
        jax.grad(
            lambda parameters: (
                score(config, None, parameters, x_BTD).probabilities_BTE[..., 0].sum()
            )
        )
    )
    gradients = loss(random_parameters())
    assert all(gradients[name][expert].any() for name in gradients for expert in range(2))


def test_rows_and_gates_of_zeros_give_rows_of_zeros_and_finite_gradients(config):
    parameters = random_parameters()
    parameters = {
        "router": parameters["router"].at[0].set(0),
        "w_gate": parameters["w_gate"].at[1].set(0),
    }
    np.testing.assert_array_equal(rows(config, parameters), jnp.zeros((2, 4)))
    gradients = jax.jit(
        jax.grad(lambda parameters: jnp.sum(jnp.sin(1 + rows(config, parameters))))
    )(parameters)
    assert all(jnp.isfinite(leaf).all() for leaf in gradients.values())
