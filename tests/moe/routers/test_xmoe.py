"""The cosine router: by hand, independent of lengths, balanced, and its rows in token space."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_erc.moe.routers.xmoe import XMoE
from tests.tolerance import assert_close, magnitude

score = XMoE().score
rows = XMoE().rows


def parameters(temperature=0.5):
    keys = jax.random.split(jax.random.key(0))
    return {
        "projection": jax.random.normal(keys[0], (5, 2)),
        "expert_embedding": jax.random.normal(keys[1], (4, 2)),
        "temperature": jnp.float32(temperature),
    }


def tokens():
    return jax.random.normal(jax.random.key(1), (2, 3, 5))


def test_cosines_by_hand():
    by_hand = {
        "projection": jnp.eye(3, 2),
        "expert_embedding": jnp.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [3.0, 4.0]]),
        "temperature": jnp.float32(0.5),
    }
    scores = score(None, None, by_hand, jnp.array([[[3.0, 4.0, 7.0]]]))
    # The projection is (3, 4) of length 5. The cosines are 0.6, 0.8, -0.6 and 1, over 0.5.
    assert_close(scores.logits_BTE, [[[1.2, 1.6, -1.2, 2.0]]], terms=8)
    powers = np.exp([1.2, 1.6, -1.2, 2.0])
    assert_close(scores.probabilities_BTE, [[powers / powers.sum()]], terms=8)
    powers = np.exp(np.array([0.6, 0.8, -0.6, 1.0]) / 0.3)
    # Roundings: a cosine, a quotient, an exponential.
    assert_close(scores.balance_BTE, [[powers / powers.sum()]], terms=16)


def test_lengths_of_tokens_and_embeddings_do_not_matter():
    of, scale_E1 = parameters(), jnp.array([[0.01], [3.0], [50.0], [1.0]])
    scaled = of | {"expert_embedding": of["expert_embedding"] * scale_E1}
    expected_BTE = score(None, None, of, tokens()).logits_BTE
    # Cosines over the temperature 0.5. Roundings: a sum over 5, norms and quotients.
    assert_close(score(None, None, scaled, 20 * tokens()).logits_BTE, expected_BTE, terms=5 + 16)


def test_balance_does_not_know_the_temperature():
    cold, warm = (
        score(None, None, parameters(temperature), tokens()) for temperature in (0.1, 1.0)
    )
    np.testing.assert_array_equal(cold.balance_BTE, warm.balance_BTE)
    assert np.abs(cold.probabilities_BTE - warm.probabilities_BTE).max() > 0.1


def test_a_rows_share_of_a_token_is_its_cosine():
    of, x_BTD = parameters(temperature=1.0), tokens()
    length_BT1 = jnp.linalg.norm(x_BTD @ of["projection"], axis=-1, keepdims=True)
    cosine_BTE = score(None, None, of, x_BTD).logits_BTE
    # A short projection is a difference of longer products, so its error is relative to these.
    largest = magnitude(x_BTD @ rows(None, of).T) / float(jnp.min(length_BT1))
    assert_close(x_BTD @ rows(None, of).T / length_BT1, cosine_BTE, terms=5 + 16, largest=largest)


def test_gradients_reach_every_parameter_and_are_finite_at_zero():
    def gradients(of):
        return jax.grad(lambda of: score(None, None, of, tokens()).probabilities_BTE[..., 0].sum())(
            of
        )

    gradients = jax.jit(gradients)
    found, zero = gradients(parameters()), jax.tree.map(jnp.zeros_like, parameters())
    assert all(leaf.any() and jnp.isfinite(leaf).all() for leaf in found.values())
    # A temperature of 0 does not divide either.
    assert all(jnp.isfinite(leaf).all() for leaf in gradients(zero).values())


def test_a_projection_has_half_as_many_dimensions_as_there_are_experts(model_config):
    shapes = {
        E: declared_shapes(model_config(router="xmoe", experts=E, experts_per_token=1))
        for E in (4, 7)
    }
    assert shapes[4] == {"projection": (32, 2), "expert_embedding": (4, 2), "temperature": ()}
    assert shapes[7] == {"projection": (32, 3), "expert_embedding": (7, 3), "temperature": ()}


def declared_shapes(config):
    return {name: parameter.shape for name, parameter in config.router.parameters(config).items()}
