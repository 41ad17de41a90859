"""Path coupling by hand and against a loop over pairs, and its gradient."""

import jax
import numpy as np
import pytest

from moe_erc.losses.path_coupling import chosen_probability, path_coupling
from tests.tolerance import assert_close

coupling = jax.jit(path_coupling)
coupling_and_gradient = jax.jit(jax.value_and_grad(path_coupling))


def test_chosen_probability_by_hand():
    # The tokens have chosen 0.5 + 0.2; 0.3 and an empty slot; nothing.
    p_BTE = np.float32([[[0.5, 0.3, 0.2]] * 3])
    experts_BTK = np.array([[[0, 2], [1, 3], [4, 3]]])
    found_BT, pull_back = jax.vjp(lambda p_BTE: chosen_probability(p_BTE, experts_BTK), p_BTE)
    assert_close(found_BT, [[0.7, 0.3, 0.0]], terms=8)
    (gradient_BTE,) = pull_back(np.ones((1, 3), np.float32))
    np.testing.assert_array_equal(gradient_BTE, [[[1, 0, 1], [0, 1, 0], [0, 0, 0]]])


CHOSEN_LBT = np.float32([[[0.5, 0.8, 1.0]], [[0.4, 0.5, 1.0]], [[0.1, 1.0, 1.0]]])
MASK_BT = np.array([[True, True, False]])


def test_path_coupling_by_hand():
    # 2 tokens and 2 pairs of layers:
    # token 0: 0.5 * 0.4 and 0.4 * 0.1
    # token 1: 0.8 * 0.5 and 0.5 * 1
    # token 2 is masked
    assert coupling(CHOSEN_LBT, MASK_BT) == pytest.approx(-(0.2 + 0.04 + 0.4 + 0.5) / 4, rel=1e-6)


def test_path_coupling_gradient_by_hand():
    _, gradient_LBT = coupling_and_gradient(CHOSEN_LBT, MASK_BT)
    assert_close(gradient_LBT[:, 0, 0], np.array([0.4, 0.5 + 0.1, 0.4]) / -4, terms=8)
    np.testing.assert_array_equal(gradient_LBT[..., 2], np.zeros((3, 1)))


def test_the_product_of_sums_is_the_sum_over_pairs_of_experts():
    rng = np.random.default_rng(0)
    p_LBTE = rng.dirichlet(np.ones(6), size=(3, 2, 4)).astype(np.float32)
    experts_LBTK = np.argsort(-p_LBTE, axis=-1)[..., :2]
    total = 0.0
    for layer, b, t in np.ndindex(2, 2, 4):
        for e in experts_LBTK[layer, b, t]:
            total += sum(
                p_LBTE[layer, b, t, e] * p_LBTE[layer + 1, b, t, v]
                for v in experts_LBTK[layer + 1, b, t]
            )
    chosen_LBT = jax.vmap(chosen_probability)(p_LBTE, experts_LBTK)
    assert_close(
        coupling(chosen_LBT, np.ones((2, 4), bool)), -total / (2 * 2 * 4), terms=2 * 2 * 4 + 8
    )


@pytest.mark.parametrize(
    "chosen_LBT, mask_BT", [(CHOSEN_LBT[:1], MASK_BT), (CHOSEN_LBT, np.zeros((1, 3), bool))]
)
def test_one_layer_and_a_masked_batch_have_no_path(chosen_LBT, mask_BT):
    value, gradient_LBT = coupling_and_gradient(chosen_LBT, mask_BT)
    assert value == 0
    np.testing.assert_array_equal(gradient_LBT, np.zeros(chosen_LBT.shape))
