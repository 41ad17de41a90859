"""The stack is causal, and the same with recomputation and on any mesh; statistics are by layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_erc import sharding
from moe_erc.losses.load_balance import load
from moe_erc.model.transformer import Transformer
from tests.tolerance import assert_close


def logits(output):
    return jnp.einsum("btd,vd->btv", output.x_BTD, output.head_VD)


@functools.cache
def setup(config):
    """(model, its initial variables, which no batch changes)."""
    model, tokens = Transformer(config), jnp.zeros((2, 4), jnp.int32)
    return model, jax.jit(model.init)(jax.random.key(0), tokens, tokens > -1, {})


@functools.cache
def applied(config):
    """`model.apply` as one program. One operation at a time takes ten times as long to compile."""
    return jax.jit(setup(config)[0].apply)


def test_initial_parameters_are_cut_at_three_sigma_and_norms_are_one(model_config):
    _, variables = setup(model_config())
    params = variables["params"]
    for name, leaf in (("embed", params["embed"]), ("w_gate", params["layers"]["moe"]["w_gate"])):
        assert np.abs(leaf).max() <= 0.06 and 0.018 < leaf.std() < 0.022, name
    assert (params["final_norm"] == 1).all() and (
        params["layers"]["attention"]["query_norm"] == 1
    ).all()
    gates = params["layers"]["moe"]["w_gate"]
    assert not np.array_equal(gates[0], gates[1])  # every layer draws its own


def test_a_token_sees_only_what_came_before(model_config, token_batch):
    batch = token_batch(2, 12)
    config = model_config()
    _, variables = setup(config)
    changed = batch["inputs_BT"].copy()
    changed[:, 8] += 1
    before, after = (
        logits(applied(config)(variables, tokens, batch["mask_BT"], {}))
        for tokens in (batch["inputs_BT"], changed)
    )
    # The program is the same, and these outputs do not depend on the change.
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert np.abs(before[:, 8:] - after[:, 8:]).max() > 1e-3


def test_statistics_are_by_layer_and_ignore_masked_tokens(model_config, token_batch):
    batch, config = token_batch(2, 12), model_config()
    _, variables = setup(config)
    routing = applied(config)(variables, batch["inputs_BT"], batch["mask_BT"], {}).routing
    assert load(routing.assignments_E).shape == (config.layers, config.experts)
    assert_close(load(routing.assignments_E).sum(axis=-1), 1, terms=8)
    assert_close(routing.probability_E.sum(axis=-1), 1, terms=8)
    tokens = batch["inputs_BT"].copy()
    tokens[-1, -1] = (tokens[-1, -1] + 7) % 512  # a masked position, which no other sees
    again = applied(config)(variables, tokens, batch["mask_BT"], {}).routing
    # The program is the same, and these outputs do not depend on the change.
    jax.tree.map(np.testing.assert_array_equal, routing, again)


def test_recomputation_changes_no_gradient_and_saves_memory(model_config, token_batch):
    batch = token_batch(4, 64)

    _, variables = setup(model_config(layers=6))

    def compiled(remat):
        model = Transformer(model_config(remat=remat, layers=6))

        def loss(variables):
            return jnp.mean(
                jnp.sin(logits(model.apply(variables, batch["inputs_BT"], batch["mask_BT"], {})))
            )

        return jax.jit(jax.grad(loss)).lower(variables).compile()

    kept, recomputed = compiled("none"), compiled("block")
    # Roundings: six layers, forward and backward, with sums over widths of at most 32 and over 64
    # tokens. The head sums 256 tokens.
    assert_close(kept(variables), recomputed(variables), terms=2 * 6 * (3 * 32 + 64) + 256)
    assert (
        recomputed.memory_analysis().temp_size_in_bytes
        < 0.5 * kept.memory_analysis().temp_size_in_bytes
    )


def test_tied_embeddings_share_one_matrix(model_config, token_batch):
    batch = token_batch(1, 4)
    config = model_config(tie_embeddings=True)
    _, variables = setup(config)
    assert "head" not in variables["params"]
    output = applied(config)(variables, batch["inputs_BT"], batch["mask_BT"], {})
    np.testing.assert_array_equal(output.head_VD, variables["params"]["embed"])


def test_bfloat16_computes_in_bfloat16_and_routes_in_float32(model_config, token_batch):
    batch = token_batch(2, 8)
    config = model_config(dtype="bfloat16")
    _, variables = setup(config)
    output = applied(config)(variables, batch["inputs_BT"], batch["mask_BT"], {})
    assert output.x_BTD.dtype == jnp.bfloat16
    counts = {jnp.dtype("int32")}  # of assignments and tokens; means are float32
    assert {leaf.dtype for leaf in jax.tree.leaves(output.routing)} == {
        jnp.dtype("float32")
    } | counts
    reference = applied(model_config())(variables, batch["inputs_BT"], batch["mask_BT"], {})
    difference = np.linalg.norm(output.x_BTD.astype(jnp.float32) - reference.x_BTD)
    # Two layers compute with 8 bits of mantissa.
    assert difference < 0.05 * np.linalg.norm(reference.x_BTD)


def test_a_mesh_gives_the_oracles_outputs(model_config, token_batch):
    batch = token_batch(8, 12)
    config = model_config(experts_implementation="dense")
    _, variables = setup(config)
    expected = applied(config)(variables, batch["inputs_BT"], batch["mask_BT"], {})
    model = Transformer(model_config(), sharding.make_mesh(2, 4))
    found = jax.jit(model.apply)(variables, batch["inputs_BT"], batch["mask_BT"], {})
    # Roundings: two layers with five sums over widths of at most 32 each. Loads and probabilities
    # are sums over 93 tokens.
    assert_close(jax.device_get(found), expected, terms=2 * 5 * 32 + 93)
