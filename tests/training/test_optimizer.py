import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from moe_erc.model.config import ModelConfig
from moe_erc.training.optimizer import (
    OptimizerConfig,
    decay_mask,
    directions,
    learning_rate_schedule,
    make_optimizer,
)
from tests.tolerance import assert_close

L, E, D, F, V = 2, 3, 8, 4, 11
SHAPES = {
    "embed": (V, D),
    "head": (V, D),
    "final_norm": (D,),
    "layers": {
        "attention": {"query": (L, D, D), "output": (L, D, D), "query_norm": (L, D)},
        "attention_norm": (L, D),
        "moe_norm": (L, D),
        "moe": {
            "router": (L, E, D),
            "w_gate": (L, E, D, F),
            "w_up": (L, E, D, F),
            "w_down": (L, E, F, D),
        },
    },
}
CONFIG = OptimizerConfig(
    name="adamw",
    learning_rate=1.0,
    schedule="constant",
    warmup_steps=0,
    decay_fraction=0.2,
    final_fraction=0.1,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.0,
    clip_norm=math.inf,
)


def changed(**fields):
    return dataclasses.replace(CONFIG, **fields)


def random_params(seed):
    shapes, tree = jax.tree.flatten(SHAPES, is_leaf=lambda node: isinstance(node, tuple))
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return tree.unflatten(
        jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)
    )


def first_update(config, grads, params):
    optimizer = make_optimizer(config, 10, ModelConfig.of(base.get_config("debug")))
    return jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]


# Peak 1, warm-up 4 of 20 steps, end at 0.1. Warm-up is (t + 1) / 5.
# 16 steps remain, so t = 12 is half way:
#   cosine  0.1 + 0.9 * (1 + cos(pi / 2)) / 2 = 0.55
#           and a quarter of the way 0.1 + 0.9 * (1 + cos(pi / 4)) / 2
#   linear  1 - 0.9 * 8 / 16 = 0.55
#   wsd     the last 0.2 * 20 = 4 steps fall: flat until 16, half way at 18
@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", {0: 0.2, 3: 0.8, 4: 1.0, 12: 1.0, 20: 1.0}),
        ("cosine", {0: 0.2, 3: 0.8, 4: 1.0, 8: 0.8681981, 12: 0.55, 20: 0.1}),
        ("linear", {0: 0.2, 3: 0.8, 4: 1.0, 12: 0.55, 20: 0.1}),
        ("wsd", {0: 0.2, 3: 0.8, 4: 1.0, 12: 1.0, 16: 1.0, 18: 0.55, 20: 0.1}),
    ],
)
def test_schedule_passes_through_the_points_of_its_formula(schedule, rates):
    rate = learning_rate_schedule(changed(schedule=schedule, warmup_steps=4), steps=20)
    assert_close([rate(step) for step in rates], list(rates.values()), terms=8)


def test_without_warmup_the_first_update_is_at_the_peak():
    assert learning_rate_schedule(changed(schedule="linear"), steps=10)(0) == 1.0


def test_matrices_decay_and_norm_scales_do_not():
    mask = decay_mask(random_params(0))
    kept = {
        jax.tree_util.keystr(path)
        for path, decays in jax.tree_util.tree_leaves_with_path(mask)
        if not decays
    }
    norms = (
        "['layers']['attention']['query_norm']",
        "['layers']['attention_norm']",
        "['layers']['moe_norm']",
    )
    assert kept == {"['final_norm']", *norms}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_is_decoupled_and_scaled_by_the_learning_rate(name):
    params = random_params(0)
    config = changed(name=name, learning_rate=0.5, weight_decay=0.1)
    update = first_update(config, jax.tree.map(jnp.zeros_like, params), params)
    # Without a gradient there is no direction. Weight decay remains: -0.5 * 0.1 * matrix.
    assert_close(update["layers"]["moe"]["w_up"], -0.05 * params["layers"]["moe"]["w_up"], terms=8)
    assert_close(update["embed"], -0.05 * params["embed"], terms=8)
    np.testing.assert_array_equal(update["final_norm"], 0)
    np.testing.assert_array_equal(update["layers"]["moe_norm"], 0)


def test_adamw_is_the_adamw_of_optax():
    params, grads = random_params(0), random_params(1)
    reference = optax.adamw(1.0, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=decay_mask)
    expected, _ = reference.update(grads, reference.init(params), params)
    update = first_update(changed(weight_decay=0.1), grads, params)
    # Roundings: moments, a root and a quotient of every element alone.
    assert_close(update, expected, terms=16)


def test_clipping_bounds_the_norm_of_all_gradients_together():
    # Gradients (3, 0) and (0, 4) have the norm 5. Clipped to 1 they are (0.6, 0) and (0, 0.8). With
    # eps = 1 and no averaging (b1 = b2 = 0), Adam's first direction is g / (|g| + 1):
    # 0.6 / 1.6 = 0.375 and 0.8 / 1.8 = 0.4444.
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0, 4.0])}
    update = first_update(changed(clip_norm=1.0, eps=1.0, b1=0.0, b2=0.0), grads, params)
    assert_close(update["a"], [-0.375, 0], terms=8)
    assert_close(update["b"], [0, -0.8 / 1.8], terms=8)


def test_muon_takes_the_hidden_matrices_and_adam_the_rest(model_config):
    labels = directions(random_params(0), model_config().router.parameters(model_config()))
    muon = {
        jax.tree_util.keystr(path)
        for path, who in jax.tree_util.tree_leaves_with_path(labels)
        if who == "muon"
    }
    attention = {f"['layers']['attention']['{name}']" for name in ("query", "output")}
    assert muon == attention | {
        f"['layers']['moe']['{name}']" for name in ("w_gate", "w_up", "w_down")
    }


def test_what_other_routers_add_is_taken_by_what_it_is(model_config):
    # Leaves have a layer axis. Adam updates rows, and scalars and vectors of experts. Only matrices
    # decay.
    shapes = {
        "projection": (L, D, 2),
        "expert_embedding": (L, E, 2),
        "temperature": (L,),
        "threshold": (L, E),
    }
    shapes |= {"w_low": (L, E, D, 2), "w_high": (L, E, 2, F), "shared_up": (L, D, F)}
    params = {"layers": {"moe": {name: jnp.zeros(shape) for name, shape in shapes.items()}}}
    added = {}
    for router in ("xmoe", "routing_free"):
        config = model_config(router=router)
        added |= config.router.parameters(config)
    muon = {
        name for name, who in directions(params, added)["layers"]["moe"].items() if who == "muon"
    }
    assert muon == {"projection", "w_low", "w_high", "shared_up"}
    kept = {name for name, decays in decay_mask(params)["layers"]["moe"].items() if not decays}
    assert kept == {"temperature", "threshold"}


def test_muon_orthogonalises_every_expert_of_every_layer_alone():
    params, grads = random_params(0), random_params(1)
    # An expert with a large gradient must not change the direction of one with a small gradient.
    grads["layers"]["moe"]["w_gate"] = grads["layers"]["moe"]["w_gate"].at[0, 0].mul(1e3)
    update = first_update(changed(name="muon"), grads, params)["layers"]["moe"]
    for name in ("w_gate", "w_down"):
        for layer, expert in np.ndindex(L, E):
            alone = {"layers": {"w": params["layers"]["moe"][name][None, layer, expert]}}
            gradient = {"layers": {"w": grads["layers"]["moe"][name][None, layer, expert]}}
            expected = first_update(changed(name="muon"), gradient, alone)["layers"]["w"][0]
            # Each of five steps of Newton-Schulz multiplies the smallest singular values by 3.4445,
            # and with them the roundings of the norm and of the first product.
            assert_close(update[name][layer, expert], expected, terms=2 * 3.4445**5)


def test_muon_steps_are_nearly_orthogonal_with_the_rms_of_adam():
    update = first_update(changed(name="muon"), random_params(1), random_params(0))["layers"][
        "moe"
    ]["w_up"]
    # The update is (8, 4) orthogonal columns times 0.2 sqrt(8). Newton-Schulz leaves their singular
    # values between 0.6 and 1.3.
    values = jnp.linalg.svd(update, compute_uv=False) / (0.2 * math.sqrt(8))
    assert values.min() > 0.6 and values.max() < 1.3
    assert 0.6 * 0.2 < jnp.sqrt(jnp.mean(update**2)) < 1.3 * 0.2


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("name", "adam", "the nearest is 'adamw'"),
        ("name", "lion2000", "not one of adamw, muon"),
        ("schedule", "cosin", "the nearest is 'cosine'"),
        ("learning_rate", 0.0, "positive"),
        ("learning_rate", math.nan, "positive"),
        ("warmup_steps", -1, "at least 0"),
        ("decay_fraction", 0.0, "above 0"),
        ("final_fraction", 1.5, "from 0 to 1"),
        ("b2", 1.0, "below 1"),
        ("weight_decay", -0.1, "at least 0"),
        ("clip_norm", 0.0, "inf never clips"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_key_and_mend(field, value, says):
    with pytest.raises(ValueError, match=rf"optimizer\.{field}: .*{says}") as error:
        changed(**{field: value})
    assert "\n" not in str(error.value)


def test_warmup_must_end_before_the_run_and_leave_room_for_the_decay(model_config):
    with pytest.raises(
        ValueError, match=r"optimizer\.warmup_steps: 10 must be below 10, the steps"
    ):
        make_optimizer(changed(warmup_steps=10), 10, model_config())
    with pytest.raises(
        ValueError, match=r"optimizer\.decay_fraction: 0\.5 decays over 5 of 10 steps, but only 4"
    ):
        make_optimizer(
            changed(schedule="wsd", warmup_steps=6, decay_fraction=0.5), 10, model_config()
        )


def test_norms_decay_where_they_are_asked_to_and_other_vectors_never():
    params = random_params(0)
    params["layers"]["moe"] |= {"threshold": jnp.ones((L, E)), "temperature": jnp.ones(L)}
    grads = jax.tree.map(jnp.zeros_like, params)
    for decay_norms in (False, True):
        update = first_update(changed(weight_decay=0.5, decay_norms=decay_norms), grads, params)
        shares = jax.tree.map(lambda u, p: float((u / p).ravel()[0]), update, params)
        norms = -0.5 if decay_norms else 0.0
        assert (
            shares["layers"]["attention_norm"]
            == shares["layers"]["attention"]["query_norm"]
            == norms
        )
        assert shares["layers"]["moe_norm"] == shares["final_norm"] == norms
        assert shares["layers"]["moe"]["threshold"] == shares["layers"]["moe"]["temperature"] == 0
        assert shares["embed"] == shares["layers"]["moe"]["router"] == -0.5
