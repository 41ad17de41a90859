"""Cross-entropy by hand; slicing time changes nothing but memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.losses.language_model import language_model, token_losses
from moe_erc.losses.router_z import router_z
from tests.tolerance import assert_close, magnitude


def test_token_losses_by_hand():
    # D = 1, x = 1, head rows 0, ln 2, ln 5: probabilities 1/8, 2/8, 5/8
    head_VD = jnp.log(jnp.array([[1.0], [2.0], [5.0]]))
    losses_BT = token_losses(jnp.ones((1, 3, 1)), head_VD, jnp.array([[0, 1, 2]]), chunk=3)
    assert_close(losses_BT, -np.log([[1 / 8, 2 / 8, 5 / 8]]), terms=8)


def test_mean_counts_unmasked_positions_alone():
    losses_BT, mask_BT = jnp.array([[1.0, 2.0, 100.0]]), jnp.array([[True, True, False]])
    assert language_model(losses_BT, mask_BT) == pytest.approx(1.5)
    assert language_model(losses_BT, jnp.zeros((1, 3), bool)) == 0.0


# Some slices divide the 10 positions, some do not, and one holds all of them.
@pytest.mark.parametrize("chunk", [1, 4, 5, 7, 10])
def test_slices_give_the_same_losses_and_gradients(chunk):
    keys = jax.random.split(jax.random.key(0), 3)
    x_BTD, head_VD = jax.random.normal(keys[0], (2, 10, 8)), jax.random.normal(keys[1], (16, 8))
    targets_BT = jax.random.randint(keys[2], (2, 10), 0, 16)

    def loss(x_BTD, head_VD, chunk):
        return jnp.sum(jnp.sin(token_losses(x_BTD, head_VD, targets_BT, chunk)))

    whole, sliced = (
        jax.value_and_grad(loss, argnums=(0, 1))(x_BTD, head_VD, size) for size in (10, chunk)
    )
    # Logits are sums over 8, and their exponentials are summed over 16. Gradients also sum over 20
    # positions, and so does the sum of sines.
    assert_close(sliced, whole, terms=2 * (8 + 16) + 20, largest=magnitude(whole[1][0]))


def test_all_logits_never_exist_at_once():
    B, T, D, V = 2, 1024, 16, 50_304
    shapes = [
        jax.ShapeDtypeStruct(*spec)
        for spec in (((B, T, D), jnp.float32), ((V, D), jnp.float32), ((B, T), jnp.int32))
    ]

    def loss(x_BTD, head_VD, targets_BT):
        return jnp.mean(token_losses(x_BTD, head_VD, targets_BT, 64))

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    # All logits take 412 MB, a slice of 64 takes 26 MB. The backward pass keeps a few buffers of
    # that size.
    assert compiled.memory_analysis().temp_size_in_bytes < B * T * V * 4 / 2


def test_router_z_averages_layers():
    assert router_z(jnp.array([1.0, 4.0])) == pytest.approx(2.5)
