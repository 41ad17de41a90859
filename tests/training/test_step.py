"""One step: what it adds up, what it draws, and that neither micro-batches nor the mesh change it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from moe_erc import erc_loss, sharding
from moe_erc.losses import objective as objective_module
from moe_erc.losses.objective import Objective
from moe_erc.model.transformer import Transformer
from moe_erc.training import step as step_module
from moe_erc.training.state import abstract_state, initializer, shardings

pytestmark = pytest.mark.usefixtures("quick_compilation")
LENGTH, BATCH = 16, 16


@pytest.fixture(scope="module")
def trainer(model_config):
    """Makes (fresh state, step function) of the ERC loss under gradient descent; each kind is compiled once."""

    @functools.cache
    def compiled(mesh_shape, micro_batches, scope, implementation):
        losses = base.get_config("debug").losses.to_dict()
        losses["erc"] |= {"weight": 1.0, "alpha": 0.5}
        losses["load_balance"] |= {"weight": 0.1, "scope": scope}
        losses["router_z"] |= {"weight": 0.1}
        mesh, optimizer = sharding.make_mesh(*mesh_shape), optax.sgd(0.1)
        model = Transformer(model_config(init_std=0.3, experts_implementation=implementation), mesh)
        init = initializer(model, optimizer, 0)
        shapes = abstract_state(init, mesh)
        step = step_module.make_train_step(model, Objective(losses, mesh), optimizer, micro_batches, shardings(shapes))
        return jax.jit(init, out_shardings=shardings(shapes)), lambda state, batch: step(
            state, sharding.put_batch(mesh, batch)
        )

    def make(mesh_shape=(1, 1), micro_batches=1, scope="micro_batch", implementation="block_loop"):
        init, step = compiled(mesh_shape, micro_batches, scope, implementation)
        return init(), step

    return make


def close(expected, found, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance), expected, found)


def test_metrics_are_the_unweighted_terms_and_their_weighted_total(trainer, token_batch):
    state, step = trainer()
    moe = jax.tree.map(jnp.copy, state.params["layers"]["moe"])
    erc = erc_loss(moe, jax.random.fold_in(state.rng, 0), alpha=0.5)
    state, metrics = step(state, token_batch(BATCH, LENGTH))
    assert metrics["loss/erc"] == pytest.approx(float(erc), rel=1e-5)
    total = sum(weight * float(metrics[f"loss/{name}"]) for name, weight in
                (("lm", 1.0), ("erc", 1.0), ("load_balance", 0.1), ("router_z", 0.1)))  # fmt: skip
    assert metrics["loss/total"] == pytest.approx(total, rel=1e-6)
    assert int(state.step) == 1
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_a_step_draws_from_its_own_key(trainer, token_batch):
    state, step = trainer()
    batch, frozen = token_batch(BATCH, LENGTH), jax.tree.map(jnp.copy, state)
    (_, first), (_, same), (_, later) = (
        step(jax.tree.map(jnp.copy, frozen).replace(step=jnp.int32(number)), batch) for number in (0, 0, 1)
    )
    assert first["loss/erc"] == same["loss/erc"] != later["loss/erc"]
    assert first["loss/lm"] == later["loss/lm"]


def test_micro_batches_add_up_to_the_whole_batch(trainer, token_batch):
    batch = token_batch(BATCH, LENGTH)  # its mask is uneven: micro-batches have different numbers of tokens
    whole_state, whole = run(trainer(), batch)
    parts_state, parts = run(trainer(micro_batches=4), batch)
    for name in ("loss/lm", "loss/erc", "loss/router_z", "loss/lm"):
        assert parts[name] == pytest.approx(float(whole[name]), rel=1e-5), name
    # The head is out of reach of the balance loss, which as a product of two means is not the mean of its parts.
    close(whole_state.params["head"], parts_state.params["head"], 1e-5)


def run(state_and_step, batch):
    state, step = state_and_step
    return step(state, batch)


def test_parameter_losses_are_computed_once_however_many_micro_batches(trainer, token_batch, monkeypatch):
    calls = []
    monkeypatch.setitem(
        objective_module.PARAMETER_TERMS,
        "erc",
        lambda params, rng, mesh, **_: calls.append(1) or jnp.sum(params["final_norm"]),
    )
    # "ragged" is no other test's, so both programs are traced here, with the stand-in
    plain, _ = run(trainer(implementation="ragged"), token_batch(BATCH, LENGTH))
    split, _ = run(trainer(micro_batches=2, implementation="ragged"), token_batch(BATCH, LENGTH))
    assert len(calls) == 2  # once by program: outside the scan
    # descent by 0.1 times a gradient of 1, which twice as much would show
    close(plain.params["final_norm"], split.params["final_norm"], 1e-2)


def test_balance_over_the_step_differs_from_balance_by_micro_batch(trainer, token_batch):
    batch = token_batch(BATCH, LENGTH)
    _, alone = run(trainer(micro_batches=4), batch)
    _, together = run(trainer(micro_batches=4, scope="step"), batch)
    _, whole = run(trainer(), batch)
    gap = {name: abs(float(metrics["loss/load_balance"] - whole["loss/load_balance"]))
           for name, metrics in (("alone", alone), ("together", together))}  # fmt: skip
    assert gap["together"] < gap["alone"]  # running loads approach those of the whole batch


@pytest.mark.parametrize("mesh_shape, micro_batches", [((1, 4), 1), ((2, 2), 2), ((4, 2), 1)], ids=str)
def test_any_mesh_takes_the_same_steps(trainer, token_batch, mesh_shape, micro_batches):
    batch = token_batch(BATCH, LENGTH)
    results = []
    for shape, implementation in (((1, 1), "dense"), (mesh_shape, "block_loop")):
        state, step = trainer(shape, micro_batches, implementation=implementation)
        for _ in range(2):
            state, metrics = step(state, batch)
        results.append(jax.device_get((metrics, state.params)))
    close(*results, 2e-4)  # float32 sums in another order, through two steps


def test_state_lies_where_the_table_says(trainer):
    state, _ = trainer((2, 2), micro_batches=2)
    gate = state.params["layers"]["moe"]["w_gate"]
    assert gate.addressable_shards[0].data.shape == (2, 2, 32, 8)  # (L, E / 2, D, F / 2)
