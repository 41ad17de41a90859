"""CompeteSMoE's router loss by hand, and the one input that its gradient reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.losses.competition import competition, over_competing_layers
from tests.tolerance import assert_close

loss, value_and_gradients = (
    jax.jit(competition),
    jax.jit(jax.value_and_grad(competition, argnums=(0, 1))),
)

P_BTE = np.float32([[[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [1.0, 0.0, 0.0]]])
Q_BTE = np.float32([[[0.1, 0.3, 0.6], [0.2, 0.6, 0.2], [0.0, 0.0, 1.0]]])
TOP_BTK = np.array([[[2, 1], [1, 0], [2, 0]]])
MASK_BT = np.array([[True, True, False]])


def test_value_by_hand():
    # token 0: squares 0.16, 0, 0.16: over E 0.32 / 3; of experts 2 and 1 (0.16 + 0) / 2
    # token 1: squares 0.01, 0.04, 0.01: over E 0.06 / 3; of experts 1 and 0 (0.04 + 0.01) / 2
    # token 2 is masked
    expected = (0.32 / 3 + 0.2 * 0.16 / 2 + 0.06 / 3 + 0.2 * 0.05 / 2) / 2
    assert loss(P_BTE, Q_BTE, TOP_BTK, MASK_BT) == pytest.approx(expected, rel=1e-6)


def test_gradient_reaches_the_router_alone():
    _, (to_p_BTE, to_q_BTE) = value_and_gradients(P_BTE, Q_BTE, TOP_BTK, MASK_BT)
    np.testing.assert_array_equal(to_q_BTE, np.zeros(Q_BTE.shape))
    # Token 0 of two has 2 (p - q) / 3 = (0.8, 0, -0.8) / 3. The chosen expert 2 also has
    # 0.2 * 2 * -0.4 / 2 = -0.08.
    assert_close(to_p_BTE[0, 0], np.array([0.8 / 3, 0, -0.8 / 3 - 0.08]) / 2, terms=8)
    np.testing.assert_array_equal(to_p_BTE[0, 2], np.zeros(3))


def test_a_router_that_knows_the_answer_and_a_masked_batch_cost_nothing():
    assert loss(Q_BTE, Q_BTE, TOP_BTK, MASK_BT) == 0
    value, (gradient_BTE, _) = value_and_gradients(P_BTE, Q_BTE, TOP_BTK, np.zeros((1, 3), bool))
    assert value == 0
    np.testing.assert_array_equal(gradient_BTE, np.zeros(P_BTE.shape))


def test_empty_slots_add_nothing():
    # Token 0 alone counts. Its second slot and all slots of the masked tokens are empty. The chosen
    # experts still have (0.16 + 0) / 2.
    experts_BTK = np.array([[[2, 3], [3, 3], [3, 3]]])
    found = loss(P_BTE, Q_BTE, experts_BTK, np.array([[True, False, False]]))
    assert found == pytest.approx(0.32 / 3 + 0.2 * 0.16 / 2, rel=1e-6)


def test_bfloat16_is_read_in_float32():
    low = jnp.asarray(P_BTE, jnp.bfloat16), jnp.asarray(Q_BTE, jnp.bfloat16)
    found = loss(*low, TOP_BTK, MASK_BT)
    assert found.dtype == jnp.float32
    assert found == loss(*(x.astype(jnp.float32) for x in low), TOP_BTK, MASK_BT)


def test_layers_that_do_not_compete_are_no_part_of_the_mean():
    # Two of three layers compete, with losses 4 and 2. Their mean is 3; that of all would be 2.
    assert over_competing_layers(jnp.array([[4.0, 1], [0, 0], [2, 1]]), None) == 3
    assert over_competing_layers(jnp.zeros((3, 2)), None) == 0
