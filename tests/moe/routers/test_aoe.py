"""Experts that score for themselves: by hand, and in the layer against experts with whole gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.moe.layer import MoE, declare
from tests.tolerance import assert_close, assert_decided, magnitude

D, F = 4, 3


@pytest.fixture
def config(model_config):
    def make(**changes):
        sizes = {"width": D, "expert_width": F, "experts": 3, "experts_per_token": 2, "rank": D}
        return model_config(**{"router": "aoe"} | sizes | changes)

    return make


def parameters(config):
    keys = jax.random.split(jax.random.key(0), 4)
    declared = declare(config).items()
    return {
        name: jax.random.normal(key, of.shape)
        for key, (name, of) in zip(keys, declared, strict=True)
    }


def apply(config, params, x_BTD):
    observers = (("routing", lambda layer: layer.routing, ()),)
    y_BTD, _, observed = jax.jit(MoE(config, observers=observers).apply)(
        {"params": params}, x_BTD, jnp.ones(x_BTD.shape[:2], bool), {}
    )
    return y_BTD, observed["routing"]


def tokens():
    return jax.random.normal(jax.random.key(1), (2, 5, D))


def swiglu(x, gate, w_up, w_down):
    return (jax.nn.silu(gate) * (x @ w_up)) @ w_down


def test_scores_by_hand(config):
    w_low_EDr = jnp.array(
        [[[3.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 4.0], [0.0, 0.0]]]
    )
    scores = config().router.score(config(), None, {"w_low": w_low_EDr}, jnp.array([[[1.0, 2.0]]]))
    # (1, 2) becomes (3, 4), (0, 0) and (0, 4), of lengths 5, 0 and 4.
    assert_close(scores.low_BTEr, [[[[3, 4], [0, 0], [0, 4]]]], terms=4)
    assert_close(scores.logits_BTE, [[[5, 0, 4]]], terms=8)
    powers = np.exp([5, 0, 4])
    # The exponents are at most 5.
    assert_close(scores.probabilities_BTE, [[powers / powers.sum()]], terms=16, largest=5)
    np.testing.assert_array_equal(scores.balance_BTE, scores.probabilities_BTE)


def test_a_factor_of_zeros_has_a_finite_gradient(config):
    def loss(w_low_EDr):
        return (
            config()
            .router.score(config(), None, {"w_low": w_low_EDr}, tokens())
            .probabilities_BTE[..., 0]
            .sum()
        )

    assert jnp.isfinite(jax.jit(jax.grad(loss))(jnp.ones((3, D, 2)).at[1].set(0))).all()


def test_one_expert_is_a_dense_factorised_swiglu(config):
    config = config(experts=1, experts_per_token=1, rank=2)
    params, x_BTD = parameters(config), tokens()
    w_low, w_high, w_up, w_down = (
        params[name][0] for name in ("w_low", "w_high", "w_up", "w_down")
    )
    y_BTD, _ = apply(config, params, x_BTD)  # softmax of one score: weight 1
    assert_close(
        y_BTD, swiglu(x_BTD, x_BTD @ w_low @ w_high, w_up, w_down), terms=2 * D + F + 2 + 8
    )


def test_a_first_factor_that_keeps_the_token_is_a_whole_gate(config):
    params, x_BTD, scale_E = parameters(config()), tokens(), jnp.array([1.0, 0.5, 2.0])
    params["w_low"] = scale_E[:, None, None] * jnp.eye(D)
    w_gate_EDF = scale_E[:, None, None] * params["w_high"]
    y_BTD, chosen = apply(config(), params, x_BTD)
    # The lengths are |x| times 1, 0.5 and 2, so all tokens choose experts 2 and 0.
    assert (chosen.experts_BTK == jnp.array([2, 0])).all()
    lengths_BTE = jnp.linalg.norm(x_BTD, axis=-1, keepdims=True) * scale_E
    weights_BTK = jax.nn.softmax(lengths_BTE, axis=-1)[..., jnp.array([2, 0])]
    # The exponents are at most twice a length.
    assert_close(chosen.weights_BTK, weights_BTK, terms=D + 16, largest=magnitude(lengths_BTE))
    outputs = [
        swiglu(x_BTD, x_BTD @ w_gate_EDF[e], params["w_up"][e], params["w_down"][e]) for e in (2, 0)
    ]
    expected_BTD = weights_BTK[..., :1] * outputs[0] + weights_BTK[..., 1:] * outputs[1]
    assert_close(y_BTD, expected_BTD, terms=3 * D + F + 16)


def test_renormalized_weights_are_a_softmax_over_the_chosen(config):
    params, x_BTD = parameters(config()), tokens()
    _, chosen = apply(config(renormalize=True), params, x_BTD)
    lengths_BTE = jnp.linalg.norm(jnp.einsum("btd,edr->bter", x_BTD, params["w_low"]), axis=-1)
    assert_decided(lengths_BTE, 2, terms=D + 8)
    lengths_BTK, experts_BTK = jax.lax.top_k(lengths_BTE, 2)
    np.testing.assert_array_equal(chosen.experts_BTK, experts_BTK)
    expected_BTK = jax.nn.softmax(lengths_BTK, axis=-1)
    assert_close(chosen.weights_BTK, expected_BTK, terms=D + 16, largest=magnitude(lengths_BTK))
