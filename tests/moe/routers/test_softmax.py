"""The softmax router by hand."""

import jax.numpy as jnp
import numpy as np

from moe_erc.moe.routers.softmax import Softmax
from tests.tolerance import assert_close


def test_scores_are_dot_products_and_their_softmax():
    router_ED = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    scores = Softmax().score(
        None, None, {"router": router_ED}, jnp.array([[[np.log(2), np.log(3)]]])
    )
    # ln 2, 2 ln 3 = ln 9 and ln 2 + ln 3 = ln 6 give the probabilities 2 : 9 : 6 of 17.
    assert_close(scores.logits_BTE, np.log([[[2, 9, 6]]]), terms=8)
    assert_close(scores.probabilities_BTE, [[[2 / 17, 9 / 17, 6 / 17]]], terms=8)
    np.testing.assert_array_equal(scores.balance_BTE, scores.probabilities_BTE)
    assert scores.low_BTEr is None


def test_tokens_of_low_precision_are_scored_in_float32():
    router_ED = jnp.array([[1 + 2**-12], [1.0]])  # bfloat16, of 8 bits, would round the first to 1
    scores = Softmax().score(None, None, {"router": router_ED}, jnp.ones((1, 1, 1), jnp.bfloat16))
    assert scores.logits_BTE.dtype == scores.probabilities_BTE.dtype == jnp.float32
    np.testing.assert_array_equal(scores.logits_BTE, [[[1 + 2**-12, 1]]])


def test_rows_are_the_parameter():
    router_ED = jnp.eye(2)
    assert Softmax().rows(None, {"router": router_ED}) is router_ED
