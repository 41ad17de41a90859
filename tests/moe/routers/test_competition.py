"""Winners by hand, and the share of layers that compete."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.moe.routers.competition import winners
from tests.tolerance import assert_close


def test_the_strongest_answers_win_and_share_the_weight():
    affinity_BTE = jnp.log(jnp.array([[[2.0, 5.0, 3.0, 4.0]]]))
    routing, q_BTE = winners(affinity_BTE, 2)
    np.testing.assert_array_equal(routing.experts_BTK, [[[1, 3]]])
    # The weights are the affinities ln 5 and ln 4 over ln 20, not q, which is 2, 5, 3 and 4 of 14.
    assert_close(routing.weights_BTK, [[[np.log(5) / np.log(20), np.log(4) / np.log(20)]]], terms=8)
    assert_close(q_BTE, [[[2 / 14, 5 / 14, 3 / 14, 4 / 14]]], terms=8)


@pytest.mark.parametrize(
    "layers, rate, limit, share",
    [
        (2, 0.5, 2, 0.5),  # never limited: the rate
        (2, 0.5, 1, 0.375),  # none 1/4, one 1/2, both 1/4, of which one may: (1/2 + 1/4) / 2
        (3, 0.5, 1, 7 / 24),  # any of three: 7/8, over 3
        (4, 1.0, 3, 0.75),  # always all, of which three may
        (4, 0.0, 3, 0.0),
    ],
)
def test_share_of_layers_that_compete(model_config, layers, rate, limit, share):
    config = model_config(router="competition", layers=layers, rate=rate, max_layers=limit)
    assert config.router.expected_share(config) == pytest.approx(share)
