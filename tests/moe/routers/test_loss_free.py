"""The bias of loss-free balancing: one step by hand, and a skewed router that it balances."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_erc.measures.registry import of_load
from moe_erc.moe.routers.loss_free import balance_bias
from tests.tolerance import assert_close


def test_one_step_by_hand():
    # layer 0: mean 2, so expert 0 is short, 1 is at it, 2 above;  layer 1: mean 3, two are short
    bias_LE = jnp.array([[0.0, 0.5, 0.0], [1.0, 1.0, 1.0]])
    found = balance_bias(bias_LE, jnp.array([[1, 2, 3], [0, 0, 9]]), 0.1)
    assert_close(found, [[0.1, 0.5, -0.1], [1.1, 1.1, 0.9]], terms=8)


def test_an_even_load_and_a_rate_of_zero_leave_the_bias():
    bias_LE = jnp.array([[0.25, -0.5, 0.0]])
    np.testing.assert_array_equal(balance_bias(bias_LE, jnp.full((1, 3), 7), 0.1), bias_LE)
    np.testing.assert_array_equal(balance_bias(bias_LE, jnp.array([[1, 2, 3]]), 0.0), bias_LE)


def test_a_skewed_router_is_balanced():
    experts, chosen, tokens, steps = 8, 2, 4096, 600
    # Expert 7's score is above expert 0's by 2 on the average, tokens differ by a standard normal.
    scores_NE = np.random.default_rng(0).normal(size=(tokens, experts)) + np.linspace(0, 2, experts)
    probability_NE = jax.nn.softmax(jnp.float32(scores_NE))

    def load(bias_LE):
        ids_NK = lax.top_k(probability_NE + bias_LE, chosen)[1]
        return jnp.zeros((1, experts)).at[0, ids_NK].add(1.0)

    def step(bias_LE, _):
        load_LE = load(bias_LE)
        return balance_bias(bias_LE, load_LE, 1e-3), of_load(load_LE)

    bias_LE, measures = jax.jit(lambda bias_LE: lax.scan(step, bias_LE, length=steps))(jnp.zeros((1, experts)))
    first, last = ({name: values_SL[index, 0] for name, values_SL in measures.items()} for index in (0, -1))
    assert first["router/max_violation"] > 1
    assert last["router/max_violation"] < 0.1
    assert last["router/load_entropy"] > 0.999
    assert np.all(np.diff(bias_LE[0]) < 0)  # the more popular, the lower


def test_an_expert_at_exactly_the_mean_count_stands_still():
    # As shares these are sums of roundings: 7 of 49 over 7 experts, 1 of 3, 2^23 + 1 of 3 (2^23 + 1) are at the mean.
    for count, experts in ((7, 7), (1, 3), (2**23 + 1, 3), (715_827_882, 3), (8_388_607, 256)):
        at_mean_LE = jnp.full((1, experts), count, jnp.int32)
        np.testing.assert_array_equal(balance_bias(jnp.zeros((1, experts)), at_mean_LE, 0.5), np.zeros((1, experts)))
        moved_LE = at_mean_LE.at[0, 0].add(-1).at[0, 1].add(1)
        expected_LE = np.zeros((1, experts))
        expected_LE[0, :2] = 0.5, -0.5
        np.testing.assert_array_equal(balance_bias(jnp.zeros((1, experts)), moved_LE, 0.5), expected_LE)


def test_a_mean_between_whole_numbers_leaves_nobody_at_it():
    # 11 of 4 experts: the mean is 2.75
    found_LE = balance_bias(jnp.zeros((1, 4)), jnp.array([[2, 3, 1, 5]]), 1.0)
    np.testing.assert_array_equal(found_LE, [[1, -1, 1, -1]])
