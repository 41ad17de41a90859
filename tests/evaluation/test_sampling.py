"""Which tokens may be drawn, by hand; how often they are; what cannot be asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.evaluation.sampling import Sampling, draw, likely

LOGITS_BV = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]]))


@pytest.mark.parametrize("top_k, top_p, expected", [
    (0, 1.0, [[1, 1, 1, 1], [1, 1, 1, 1]]),
    (1, 1.0, [[0, 1, 0, 0], [1, 0, 0, 0]]),
    (2, 1.0, [[0, 1, 0, 1], [1, 1, 1, 1]]),  # three share the second place
    (9, 1.0, [[1, 1, 1, 1], [1, 1, 1, 1]]),
    (0, 0.6, [[0, 1, 0, 1], [1, 0, 0, 0]]),  # 0.4 is not enough, 0.4 + 0.3 is; 0.7 is
    # 0.4 + 0.3 is not enough. Neither is 0.7, and three tokens share the next place.
    (0, 0.75, [[0, 1, 1, 1], [1, 1, 1, 1]]),
    (0, 1e-6, [[0, 1, 0, 0], [1, 0, 0, 0]]),  # one is always kept
    # Of the two best, 0.4 has 0.4 / 0.7 = 0.57, and 0.7 has 0.7 / 0.8.
    (2, 0.55, [[0, 1, 0, 0], [1, 0, 0, 0]]),
    # Of the three best, 0.4 + 0.3 have 0.7 / 0.9 = 0.78, and so has 0.7.
    (3, 0.8, [[0, 1, 1, 1], [1, 1, 1, 1]]),
])  # fmt: skip
def test_likely_by_hand(top_k, top_p, expected):
    found = likely(LOGITS_BV, jnp.int32(top_k), jnp.float32(top_p))
    np.testing.assert_array_equal(found > -jnp.inf, np.array(expected, bool))
    np.testing.assert_array_equal(found[found > -jnp.inf], LOGITS_BV[found > -jnp.inf])


def frequencies(temperature, top_k=0, top_p=1.0, draws=4000):
    keys_B = jax.random.split(jax.random.key(0), draws)
    drawn_B = draw(jnp.tile(LOGITS_BV[:1], (draws, 1)), keys_B, temperature, top_k, top_p)
    return np.bincount(drawn_B, minlength=4) / draws


@pytest.mark.parametrize("temperature, top_k, top_p, expected", [
    (0.0, 0, 1.0, [0, 1, 0, 0]),
    (1e-30, 0, 1.0, [0, 1, 0, 0]),
    (1.0, 0, 1.0, [0.1, 0.4, 0.2, 0.3]),
    (0.5, 0, 1.0, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),  # squares
    (1.0, 2, 1.0, [0, 4 / 7, 0, 3 / 7]),
    (1.0, 0, 0.75, [0, 4 / 9, 2 / 9, 3 / 9]),
    # The temperature comes first: 16 / 30 is enough, and 0.4 would not be.
    (0.5, 0, 0.5, [0, 1, 0, 0]),
])  # fmt: skip
def test_tokens_are_drawn_as_often_as_they_should(temperature, top_k, top_p, expected):
    # The 4000 keys are the same on every machine. A standard deviation is at most
    # 0.5 / sqrt(4000) = 0.008.
    assert np.abs(frequencies(temperature, top_k, top_p) - expected).max() < 0.03


@pytest.mark.parametrize("wrong, words", [
    ({"new_tokens": 0}, ["new_tokens", "0", "at least 1"]),
    ({"temperature": -0.5}, ["temperature", "-0.5"]),
    ({"temperature": float("nan")}, ["temperature", "nan"]),
    ({"top_k": -1}, ["top_k", "-1"]),
    ({"top_p": 0.0}, ["top_p", "0.0", "above 0"]),
    ({"top_p": 1.5}, ["top_p", "1.5"]),
    ({"seed": 2**32}, ["seed", "4294967296"]),
    ({"stop": "\n"}, ["stop", "tuple"]),
    ({"stop": ("",)}, ["stop", "('',)"]),
])  # fmt: skip
def test_what_cannot_be_asked_for_is_refused(wrong, words):
    with pytest.raises(ValueError) as refusal:
        Sampling(**wrong)
    assert all(word in str(refusal.value) for word in words) and "\n" not in str(refusal.value)
