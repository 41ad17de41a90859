"""A step with numbers that are not finite, or with a spike, changes nothing.

The parameter or gradient at fault is named.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from moe_erc import sharding
from moe_erc.losses.objective import Objective
from moe_erc.measures.training import PARAMETER_NORM
from moe_erc.model.transformer import Transformer
from moe_erc.training import failure, guard
from moe_erc.training.failure import deepest, find_origin, save_batch
from moe_erc.training.guard import IN_A_ROW, SKIPPED, ZSCORE, GuardConfig, Stopped
from moe_erc.training.state import abstract_state, initializer, shardings
from moe_erc.training.step import make_train_step, step_gradients
from tests.tolerance import assert_close

LENGTH, BATCH = 16, 8


def watch(config, losses):
    """[(whether the step was accepted, its measures)] of steps with these losses."""
    state, seen = guard.initial(), []
    for loss in losses:
        counts, state, told = guard.judge(config, state, {"loss/total": jnp.float32(loss)})
        seen.append((bool(counts), jax.device_get(told)))
    return seen


def test_the_defaults_are_those_of_the_configs():
    assert GuardConfig() == GuardConfig(**base.get_config().guard)


def test_the_distance_to_earlier_losses_in_standard_deviations():
    # Window 2 has the shares 1, 1/2, 1/2. The means are 4, 5, 6. The variances are 0,
    # 1/2 (0 + 1/2 2^2) = 1 and 1/2 (1 + 1/2 2^2) = 1.5.
    scores = [told[ZSCORE.key] for _, told in watch(GuardConfig(window=2), [4, 6, 7, 12])]
    assert scores[:2] == [0, 0]  # nothing to compare with yet
    # Roundings: a mean and a variance of three losses.
    assert_close(np.array(scores[2:]), [2.0, 6 / np.sqrt(1.5)], terms=16)


def test_a_spike_is_reported_or_skipped_and_a_skipped_one_moves_no_mean():
    losses = [1.0, 1.1, 0.9, 1.0, 50.0, 1.0]
    reported = watch(GuardConfig(window=4), losses)
    assert [counts for counts, _ in reported] == [True] * 6 and reported[4][1][ZSCORE.key] > 100
    skipped = watch(GuardConfig(window=4, spike="skip"), losses)
    assert [counts for counts, _ in skipped] == [True] * 4 + [False, True]
    assert [told[SKIPPED.key] for _, told in skipped] == [0, 0, 0, 0, 1, 1]
    assert [told[IN_A_ROW.key] for _, told in skipped] == [0, 0, 0, 0, 1, 0]
    assert abs(skipped[5][1][ZSCORE.key]) < 0.1 and reported[5][1][ZSCORE.key] < -0.5


def test_after_too_many_in_a_row_no_step_counts_any_more():
    nan, limited = float("nan"), functools.partial(GuardConfig, limit=2)
    steps = watch(limited(nonfinite="skip"), [1, nan, 1, nan, nan, 1, 1])
    assert [accepted for accepted, _ in steps] == [True, False, True, False, False, False, False]
    assert [counts for counts, _ in watch(limited(), [1, nan, 1, 1])] == [True, False, False, False]


def test_what_is_said_of_a_step():
    told = {ZSCORE.key: 0.0, SKIPPED.key: 0, IN_A_ROW.key: 0, "loss/total": 2.0}
    assert guard.read(GuardConfig(), 7, told) == ""
    assert guard.read(GuardConfig(), 7, told | {ZSCORE.key: 8.25}) == (
        "step 7: the loss, 2, is 8.2 standard deviations above its recent mean"
    )
    bad = told | {"loss/lm": np.nan, IN_A_ROW.key: 1}
    assert guard.read(GuardConfig(), 7, bad) == "step 7: not finite: loss/lm, the step was skipped"
    with pytest.raises(Stopped, match=r"^step 7: not finite: loss/lm$"):
        guard.read(GuardConfig(), 7, bad | {IN_A_ROW.key: 10})
    with pytest.raises(
        Stopped, match=r"step 7: not finite: loss/lm; guard.limit: 10 steps skipped in a row"
    ):
        guard.read(GuardConfig(nonfinite="skip"), 7, bad | {IN_A_ROW.key: 10})
    # The guard accepted a step whose gradient was finite and whose parameters are not.
    lost = told | {PARAMETER_NORM.key: np.inf}
    for nonfinite in ("stop", "skip"):
        with pytest.raises(Stopped, match=r"^step 7: not finite: norm/parameters$"):
            guard.read(GuardConfig(nonfinite=nonfinite), 7, lost)


@pytest.mark.parametrize("change, words", [
    ({"nonfinite": "ignore"}, r"guard.nonfinite: 'ignore' is not one of stop, skip"),
    ({"spike": "stop"}, r"guard.spike: 'stop' is not one of report, skip"),
    ({"zscore": 0.0}, r"guard.zscore: 0.0 must be positive"),
    ({"window": 1}, r"guard.window: 1 must be at least 2"),
    ({"limit": 0}, r"guard.limit: 0 must be at least 1"),
])  # fmt: skip
def test_a_block_that_cannot_be_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        GuardConfig(**change)


@pytest.fixture(scope="module")
def trainer(model_config):
    """(initial state, step, gradients of a step); steps that are not finite are skipped."""
    losses = base.get_config("debug").losses.to_dict()
    losses["erc"] |= {"weight": 1.0}
    mesh, optimizer = sharding.make_mesh(1, 2), optax.adam(0.01)
    model = Transformer(model_config(bias_rate=0.01), mesh)
    init, objective = initializer(model, optimizer, 0), Objective(losses, model)
    shapes = abstract_state(init, model)
    skip = GuardConfig(nonfinite="skip", limit=3)
    step = make_train_step(model, objective, optimizer, 1, shardings(shapes), skip)
    start = jax.jit(init, out_shardings=shardings(shapes))
    return (
        start,
        lambda state, batch: step(state, sharding.put_batch(mesh, batch)),
        step_gradients(model, objective, 1),
    )


def with_number(state, number, layer):
    """The state with this number in one place of a layer's up-projection."""
    params = jax.tree.map(jnp.copy, state.params)
    moe = params["layers"]["moe"]
    moe["w_up"] = jax.device_put(moe["w_up"].at[layer, 1, 0, 0].set(number), moe["w_up"].sharding)
    return state.replace(params=params)


def host(state):
    return jax.device_get((state.params, state.opt_state, state.router, state.loss_scales))


def test_a_step_that_is_not_finite_changes_nothing_but_its_number(trainer, token_batch):
    start, step, _ = trainer
    bad = with_number(start(), jnp.nan, 1)
    before = host(bad)
    after, metrics = step(bad, token_batch(BATCH, LENGTH))
    jax.tree.map(np.testing.assert_array_equal, before, host(after))
    assert (
        np.isnan(metrics["loss/lm"])
        and after.step == 1
        and metrics[SKIPPED.key] == metrics[IN_A_ROW.key] == 1
    )
    good, metrics = step(start(), token_batch(BATCH, LENGTH))
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), host(start()), host(good))
    assert all(jax.tree.leaves(changed)) and metrics[SKIPPED.key] == 0


def test_the_run_goes_on_behind_a_skipped_step_as_if_it_had_not_been(trainer, token_batch):
    start, step, _ = trainer
    batch = token_batch(BATCH, LENGTH)
    state, _ = step(start(), batch)
    params = host(state)[0]
    state, _ = step(with_number(state, jnp.inf, 0), batch)
    mended = state.replace(
        params=jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, state.params))
    )
    skipped, metrics = step(mended, batch)
    straight, _ = step(start(), batch)
    straight, _ = step(straight.replace(step=straight.step + 1), batch)
    jax.tree.map(np.testing.assert_array_equal, host(skipped), host(straight))
    assert (int(metrics[SKIPPED.key]), int(metrics[IN_A_ROW.key])) == (1, 0)


def test_where_it_began_is_named(trainer, token_batch):
    start, _, gradients_of = trainer
    batch = token_batch(BATCH, LENGTH)
    found = find_origin(gradients_of, with_number(start(), -jnp.inf, 1), batch, 1)
    assert found == "parameter layers.moe.w_up in layer 1 is not finite"
    params = jax.tree.map(jnp.copy, start().params)
    params["head"] *= 1e38  # every weight is finite, no logit is
    found = find_origin(gradients_of, start().replace(params=params), batch, 1)
    assert found.startswith("gradient of ") and found.endswith(" is not finite")


def test_of_several_the_deepest_is_named_and_of_finite_ones_the_largest():
    one = np.float32(1)
    for bad in (np.nan, np.inf, -np.inf):
        # The largest of the last of three layers is 1.
        by_layer = np.float32([[0, bad], [bad, -2], [1, 1]])
        tree = {"embed": np.float32([[bad]]), "layers": {"router": by_layer, "w_up": by_layer}}
        sizes = jax.device_get(jax.tree_util.tree_map_with_path(failure._largest, tree))
        np.testing.assert_array_equal(sizes["layers"]["router"], [np.inf, np.inf, 1])
        assert deepest(sizes) == (np.inf, 1, "layers.w_up"), bad
    assert deepest({"embed": np.float32(3), "layers": {"router": np.array([one, 2 * one])}}) == (
        3.0,
        -1,
        "embed",
    )


def test_the_batch_is_kept(tmp_path, token_batch):
    batch = token_batch(BATCH, LENGTH)
    save_batch(tmp_path / "batch-3.npz", batch)
    with np.load(tmp_path / "batch-3.npz", allow_pickle=False) as kept:
        assert sorted(kept) == sorted(batch)
        assert all(np.array_equal(kept[name], batch[name]) for name in batch)
