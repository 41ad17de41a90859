"""One step: what it sums, what it draws; neither micro-batches nor the mesh change it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from moe_erc import erc_loss, sharding
from moe_erc.losses import LOSSES
from moe_erc.losses.base import Loss
from moe_erc.losses.objective import Objective
from moe_erc.model.transformer import Transformer
from moe_erc.random_keys import named
from moe_erc.training import step as step_module
from moe_erc.training.state import abstract_state, create_state, initializer, shardings
from tests.tolerance import assert_close, assert_same_change

LENGTH, BATCH = 16, 16
# A gradient is a sum over the tokens. Each term comes from two layers with five sums over widths of
# at most 32, forward and backward, and from scores and weights.
TERMS = BATCH * LENGTH + 2 * 2 * 5 * 32
# With the parameters of this seed, tokens spread over the four experts that `route_to` leaves: 3.8
# and 4.6 of 8.
SEED = 5


@pytest.fixture(scope="module")
def initial_state(model_config):
    """A placed state of these sizes, drawn by one program for all meshes.

    The last test shows that it is the same on all of them.
    """

    @functools.cache
    def on_host(**sizes):
        init = initializer(
            Transformer(model_config(init_std=0.3, **sizes), sharding.make_mesh(1, 1)),
            optax.sgd(0.1),
            SEED,
        )
        state = jax.jit(init)()
        return jax.device_get(state.replace(rng=jax.random.key_data(state.rng)))

    def place(lies, sizes):
        state = on_host(**sizes)
        return jax.device_put(state.replace(rng=jax.random.wrap_key_data(state.rng)), lies)

    return place


@pytest.fixture(scope="module")
def trainer(model_config, initial_state):
    """Makes (fresh state, step function) of the ERC loss under gradient descent.

    Each kind is compiled once.
    """

    @functools.cache
    def compiled(
        mesh_shape, micro_batches, scope, implementation, balance, experts, experts_per_token
    ):
        losses = base.get_config("debug").losses.to_dict()
        losses["erc"] |= {"weight": 1.0, "alpha": 0.5}
        losses["load_balance"] |= {"weight": balance, "scope": scope}
        losses["router_z"] |= {"weight": 0.1}
        mesh, optimizer = sharding.make_mesh(*mesh_shape), optax.sgd(0.1)
        sizes = {"experts": experts, "experts_per_token": experts_per_token}
        model = Transformer(
            model_config(init_std=0.3, experts_implementation=implementation, **sizes), mesh
        )
        shapes = abstract_state(initializer(model, optimizer, SEED), model)
        step = step_module.make_train_step(
            model, Objective(losses, model), optimizer, micro_batches, shardings(shapes)
        )
        return functools.partial(
            initial_state, shardings(shapes), sizes
        ), lambda state, batch: step(state, sharding.put_batch(mesh, batch))

    def make(
        mesh_shape=(1, 1),
        micro_batches=1,
        scope="micro_batch",
        implementation="block_loop",
        experts=(4, 2),
        balance=0.1,
    ):
        init, step = compiled(mesh_shape, micro_batches, scope, implementation, balance, *experts)
        return init(), step

    return make


def test_metrics_are_the_unweighted_terms_and_their_weighted_total(trainer, token_batch):
    state, step = trainer()
    moe = jax.tree.map(jnp.copy, state.params["layers"]["moe"])
    erc = erc_loss(moe, named(jax.random.fold_in(state.rng, 0), "losses.erc"), alpha=0.5)
    state, metrics = step(state, token_batch(BATCH, LENGTH))
    assert_close(metrics["loss/erc"], erc, terms=32 + 16 + 4 * 4)  # sums over D, F and pairs
    total = sum(weight * float(metrics[f"loss/{name}"]) for name, weight in
                (("lm", 1.0), ("erc", 1.0), ("load_balance", 0.1), ("router_z", 0.1)))  # fmt: skip
    assert_close(metrics["loss/total"], total, terms=8)
    assert int(state.step) == 1
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_a_step_draws_from_its_own_key(trainer, token_batch):
    state, step = trainer()
    batch, frozen = token_batch(BATCH, LENGTH), jax.tree.map(jnp.copy, state)
    (_, first), (_, same), (_, later) = (
        step(jax.tree.map(jnp.copy, frozen).replace(step=jnp.int32(number)), batch)
        for number in (0, 0, 1)
    )
    assert first["loss/erc"] == same["loss/erc"] != later["loss/erc"]
    assert first["loss/lm"] == later["loss/lm"]


def test_micro_batches_add_up_to_the_whole_batch(trainer, token_batch):
    # The mask is uneven: micro-batches have different numbers of tokens.
    batch = token_batch(BATCH, LENGTH)
    # The balance loss is off: it is a product of two means, so it is not the mean of its parts.
    (start, step), (again, by_parts) = trainer(balance=0.0), trainer(micro_batches=4, balance=0.0)
    before = jax.device_get(start.params)
    (whole_state, whole), (parts_state, parts) = step(start, batch), by_parts(again, batch)
    losses = {name for name in whole if name.startswith("loss/")}
    assert losses == {"loss/lm", "loss/erc", "loss/router_z", "loss/total"}
    for name in losses:
        assert_close(parts[name], whole[name], TERMS, label=name)
    assert_same_change(before, parts_state.params, whole_state.params, TERMS)


def run(state_and_step, batch):
    state, step = state_and_step
    return step(state, batch)


def test_parameter_losses_are_computed_once_however_many_micro_batches(
    trainer, token_batch, monkeypatch
):
    calls = []

    def counting(options, params, rng, model, shape_BT):
        calls.append(1)
        return jnp.sum(params["final_norm"])

    stand_in = Loss(kind="parameters", compute=counting, options=LOSSES["erc"].options)
    monkeypatch.setitem(LOSSES, "erc", stand_in)
    # No other test uses "ragged", so both programs are traced here, with the stand-in.
    plain, _ = run(trainer(implementation="ragged"), token_batch(BATCH, LENGTH))
    split, _ = run(trainer(micro_batches=2, implementation="ragged"), token_batch(BATCH, LENGTH))
    assert len(calls) == 2  # once by program: outside the scan
    # The descent is 0.1 times a gradient of 1, so a doubled gradient would show. The balance loss
    # does not reach this parameter.
    assert_close(split.params["final_norm"], plain.params["final_norm"], TERMS)


def test_balance_over_the_step_differs_from_balance_by_micro_batch(trainer, token_batch):
    batch = token_batch(BATCH, LENGTH)
    _, alone = run(trainer(micro_batches=4), batch)
    _, together = run(trainer(micro_batches=4, scope="step"), batch)
    _, whole = run(trainer(), batch)
    gap = {name: abs(float(metrics["loss/load_balance"] - whole["loss/load_balance"]))
           for name, metrics in (("alone", alone), ("together", together))}  # fmt: skip
    assert gap["together"] < gap["alone"]  # running loads approach those of the whole batch


def route_to(experts, state):
    """The state with every token routed to the first `experts` experts.

    The other rows of the router oppose what all tokens share.
    """
    params = jax.tree.map(jnp.copy, state.params)
    params["embed"] += 2.0
    router_LED = params["layers"]["moe"]["router"]
    # The remaining rows then respond to the differences of tokens.
    router_LED -= jnp.mean(router_LED, axis=-1, keepdims=True)
    params["layers"]["moe"]["router"] = router_LED.at[:, experts:].add(-1.0)
    return state.replace(params=params)


@pytest.fixture(scope="module")
def five_steps(trainer, token_batch):
    """{routing: (metrics, parameters) at the start, after one step, after five} on a mesh.

    There are 8 experts, and each token has one.
    """

    @functools.cache
    def run(mesh_shape, implementation):
        results = {}
        for routing, experts in (("balanced", None), ("one expert", 1), ("empty experts", 4)):
            state, step = trainer(mesh_shape, implementation=implementation, experts=(8, 1))
            state = route_to(experts, state) if experts else state
            history = [({}, jax.device_get(state.params))]
            for _ in range(5):
                state, metrics = step(state, token_batch(BATCH, LENGTH))
                history.append(jax.device_get((metrics, state.params)))
            results[routing] = history[0], history[1], history[-1]
        return results

    return run


@pytest.mark.parametrize("mesh_shape", [(1, 1), (8, 1), (1, 8), (2, 4), (4, 2)], ids=str)
def test_any_mesh_takes_the_steps_of_the_oracle_on_one_device(five_steps, mesh_shape):
    expected, found = five_steps((1, 1), "dense"), five_steps(mesh_shape, "block_loop")
    highest_L = {routing: last[0]["router/max_load"] for routing, (*_, last) in found.items()}
    assert max(highest_L["balanced"]) < 4 and min(highest_L["one expert"]) > 7.99
    assert min(highest_L["empty experts"]) >= 2 and max(highest_L["empty experts"]) < 7
    for routing in expected:
        (_, start), *_ = expected[routing]
        for steps, one, other in zip(
            (1, 5), expected[routing][1:], found[routing][1:], strict=True
        ):
            assert_close(
                other[0], one[0], steps * TERMS, label=f"{routing}, metrics after {steps}: "
            )
            # The first change is 0.1 times the gradient, so this compares gradients.
            assert_same_change(
                start, other[1], one[1], steps * TERMS, steps, f"{routing}, {steps} steps: "
            )


@pytest.mark.parametrize("data, expert", [(2, 2), (2, 4)])
def test_a_mesh_draws_the_state_of_one_device_and_it_lies_where_the_table_says(
    trainer, model_config, data, expert
):
    model = Transformer(model_config(init_std=0.3), sharding.make_mesh(data, expert))
    init = initializer(model, optax.sgd(0.1), SEED)
    drawn, (expected, _) = create_state(init, abstract_state(init, model)), trainer()
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(drawn.params), jax.device_get(expected.params)
    )
    gate = drawn.params["layers"]["moe"]["w_gate"]
    # The shape of a shard is (L, E / expert, D, F / data).
    assert gate.addressable_shards[0].data.shape == (
        2,
        4 // expert,
        32,
        16 // data,
    )


def test_the_factor_of_a_loss_weighed_at_step_0_is_kept_in_the_state(model_config):
    losses = base.get_config("debug").losses.to_dict()
    losses["erc"] |= {"weight": 1.0, "weight_at_init": 0.25}
    mesh = sharding.make_mesh(1, 1)
    model = Transformer(model_config(init_std=0.3), mesh)
    objective = Objective(losses, model)
    init = initializer(model, optax.sgd(0.1), SEED, objective)
    shapes = abstract_state(init, model)
    state = create_state(init, shapes)
    factor = float(state.loss_scales["erc"])
    given = create_state(init, shapes, jax.tree.map(jnp.copy, state.params))
    assert_close(given.loss_scales["erc"], factor, terms=TERMS)
    step = step_module.make_train_step(model, objective, optax.sgd(0.1), 1, shardings(shapes))
    tokens_BT = jnp.zeros((BATCH, LENGTH), jnp.int32)
    batch = {
        "inputs_BT": tokens_BT,
        "targets_BT": tokens_BT,
        "mask_BT": jnp.ones_like(tokens_BT, bool),
    }
    after, metrics = step(state, sharding.put_batch(mesh, batch))
    assert_close(factor * metrics["loss/erc"], 0.25, terms=TERMS)
    assert float(after.loss_scales["erc"]) == factor
