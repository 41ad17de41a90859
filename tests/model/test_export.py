"""An exported model computes what the trained one computes. Other models are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc.model.export import as_softmax_router
from moe_erc.model.transformer import Transformer
from tests.tolerance import assert_close


def trained(model, batch):
    """Parameters as large as after training: rows and gates are far from those at the start."""
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), batch["inputs_BT"], batch["mask_BT"], {}
    )["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype), shapes
    )


def runner(model, batch):
    """params -> (outputs, routing of every layer)."""
    model = model.clone(observers=(("routing", lambda layer: layer.routing, ()),))

    @jax.jit
    def run(params):
        output = model.apply({"params": params}, batch["inputs_BT"], batch["mask_BT"], {})
        return output.x_BTD, output.observed["routing"]

    return run


def test_power_iteration_is_an_ordinary_router_of_the_turned_rows(model_config, token_batch):
    model, batch = (
        Transformer(model_config(router="mpi", experts_implementation="dense")),
        token_batch(2, 8),
    )
    params = trained(model, batch)
    ordinary, exported = as_softmax_router(model, params)
    assert ordinary.config.router.name == "softmax"
    run = runner(ordinary, batch)
    expected, found = runner(model, batch)(params), run(exported)
    np.testing.assert_array_equal(found[1].experts_BTK, expected[1].experts_BTK)
    # Roundings: two layers with five sums over widths of at most 32 each, and the power step of the
    # rows over 16 and 32.
    assert_close(found[1].weights_BTK, expected[1].weights_BTK, terms=2 * 5 * 32 + 48)
    assert_close(found[0], expected[0], terms=2 * 5 * 32 + 48)
    unturned = run(params)  # the rows as they were trained are another model
    assert (unturned[1].experts_BTK != expected[1].experts_BTK).any()


def test_all_but_the_router_is_left_as_it_is(model_config, token_batch):
    model = Transformer(model_config(router="mpi"))
    params = trained(model, token_batch(1, 2))
    before = jax.tree.map(np.asarray, params)
    _, exported = as_softmax_router(model, params)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    changed = jax.tree.map(lambda a, b: a is not b, params, exported)
    assert changed["layers"]["moe"].pop("router")
    assert not any(jax.tree.leaves(changed))


def test_the_router_of_competing_experts_is_one_already(model_config, token_batch):
    model = Transformer(model_config(router="competition"))
    params = trained(model, token_batch(1, 2))
    ordinary, exported = as_softmax_router(model, params)
    assert ordinary.config.router.name == "softmax"
    jax.tree.map(np.testing.assert_array_equal, exported, params)


@pytest.mark.parametrize("router", ["aoe", "routing_free", "xmoe"])
def test_scores_that_no_row_gives_are_refused(model_config, router):
    with pytest.raises(ValueError, match=f"'{router}' cannot be exported"):
        as_softmax_router(Transformer(model_config(router=router)), {})
