"""Every config builds at every size, and runs two steps at :debug with the losses it names.

The steps are the same on another mesh. Routers and losses are compared over meshes here; variants
are only traced. `pytest -m exhaustive` runs them all.
"""

import functools
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base, sizes
from moe_erc import sharding
from moe_erc.data.text import DataConfig
from moe_erc.losses.objective import Objective
from moe_erc.model.config import ModelConfig
from moe_erc.model.transformer import Transformer
from moe_erc.training.optimizer import OptimizerConfig, make_optimizer
from moe_erc.training.state import abstract_state, create_state, initializer, shardings
from moe_erc.training.step import make_train_step
from tests import tolerance

ROOT = pathlib.Path(__file__).parents[1]
NAMES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "configs").rglob("*.py")
    if path.stem not in ("__init__", "base", "sizes")
)
SAME_SIZE_AS_VANILLA = (
    "competesmoe", "erc", "erc_expected", "erc_normalized", "expert_orthogonality", "loss_free",
    "mpi", "router_orthogonality", "sigmoid", "simbal", "synergistic", "top_p",
)  # fmt: skip
LAYER_LOSSES = (
    "output_overlap",
    "routing_variance",
    "specialization",
    "path_coupling",
    "routing_entropy",
)
SAME_SIZE_COMBINATIONS = ("erc_loss_free", "erc_mpi", "erc_router_orthogonality", "erc_sigmoid")


def get_config(name, size):
    return importlib.import_module(name).get_config(size)


def keys(config, prefix=""):
    for name, value in config.items():
        yield from keys(value, f"{prefix}{name}.") if hasattr(value, "items") else [prefix + name]


@pytest.mark.parametrize("size", sizes.MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_whole_at_every_size_and_adds_no_key(name, size):
    config = get_config(name, size)
    assert set(keys(config)) == set(keys(base.get_config(size)))
    model = Transformer(ModelConfig.of(config))
    DataConfig(**config.data), OptimizerConfig(**config.optimizer)
    Objective(config.losses.to_dict(), model)
    assert config.train.batch_size % config.train.micro_batches == 0
    assert config.model.experts % config.mesh.expert == 0


@pytest.mark.parametrize("size", sizes.MODELS)
def test_methods_are_compared_at_the_sizes_they_claim(size):
    vanilla = ModelConfig.of(base.get_config(size))
    counts = {name: ModelConfig.of(get_config(name, size)).parameters() for name in NAMES}
    for name in (
        *SAME_SIZE_AS_VANILLA,
        *(f"combinations.{pair}" for pair in SAME_SIZE_COMBINATIONS),
    ):
        assert counts[f"configs.{name}"] == vanilla.parameters(), name
    assert 0.99 * vanilla.parameters() < counts["configs.aoe"] <= vanilla.parameters()
    assert (
        counts["configs.routing_free"] == counts["configs.aoe"] + vanilla.layers * vanilla.experts
    )
    experts, width = vanilla.experts, vanilla.width
    fewer = experts * width - (experts * width // 2 + experts**2 // 2 + 1)
    assert counts["configs.xmoe"] == vanilla.parameters() - vanilla.layers * fewer
    shared = ModelConfig.of(get_config("configs.shared_experts", size))
    assert shared.active_parameters() == vanilla.active_parameters()
    assert shared.flops_per_token(8) == vanilla.flops_per_token(8)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_says_how_it_is_run(name):
    path = name.replace(".", "/") + ".py"
    assert f"python train.py --config={path}" in importlib.import_module(name).__doc__


def test_no_size_is_tiny_and_an_unknown_one_is_refused():
    assert base.get_config() == base.get_config("tiny")
    with pytest.raises(ValueError, match=r"huge.*debug, tiny"):
        base.get_config("huge")


@functools.cache
def initial_state(model_config):
    """The initial state on the host, under gradient descent.

    All configs of the same model share one program.
    """
    mesh = sharding.make_mesh(1, 1)
    init = initializer(Transformer(model_config, mesh), optax.sgd(1.0), 0)
    state = create_state(init, where_it_lies(model_config, (1, 1)))
    return jax.device_get(state.replace(rng=jax.random.key_data(state.rng)))


@functools.cache
def where_it_lies(model_config, mesh_shape):
    """Shapes and placement of the state, traced once for all configs of the same model."""
    mesh = sharding.make_mesh(*mesh_shape)
    model = Transformer(model_config, mesh)
    return abstract_state(initializer(model, optax.sgd(1.0), 0), model)


def take_steps(config, mesh_shape, batch, steps, micro_batches=2):
    """(metrics of every step, state) on the host: descent by the gradient itself."""
    model_config, mesh, optimizer = (
        ModelConfig.of(config),
        sharding.make_mesh(*mesh_shape),
        optax.sgd(1.0),
    )
    model = Transformer(model_config, mesh)
    start, lies = initial_state(model_config), shardings(where_it_lies(model_config, mesh_shape))
    state = jax.device_put(start.replace(rng=jax.random.wrap_key_data(start.rng)), lies)
    step = make_train_step(
        model, Objective(config.losses.to_dict(), model), optimizer, micro_batches, lies
    )
    history = []
    for _ in range(steps):
        state, metrics = step(state, sharding.put_batch(mesh, batch))
        history.append(jax.device_get(metrics))
    return history, jax.device_get(state.replace(rng=jax.random.key_data(state.rng)))


def debug_config(name):
    """The config at :debug. Where experts can compete, they compete in every step."""
    config = get_config(name, "debug")
    config.routers.competition.rate = 1.0
    if config.model.router == "competition":
        config.model.init_std = 0.1  # answers of experts that differ by more than their rounding
    return config


@functools.cache
def two_steps(name, mesh_shape, token_batch):
    """Two steps of a config, with a row for each of 8 devices and 2 micro-batches."""
    config = debug_config(name)
    return take_steps(config, mesh_shape, token_batch(16, config.data.sequence_length), 2)


def finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


# Names with one of these parts vary a config whose steps are taken.
VARIANTS = ("ablations", "combinations", "erc_", "_decoupled")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.exhaustive)
    if any(part in name for part in VARIANTS)
    else name
    for name in NAMES
])  # fmt: skip
def test_two_steps_at_debug(name, token_batch):
    config, ((first, second), state) = debug_config(name), two_steps(name, (1, 1), token_batch)
    expected = {f"loss/{term}" for term, options in config.losses.items() if options.weight > 0} | {
        "loss/total"
    }
    assert {metric for metric in first if metric.startswith("loss/")} == expected
    assert finite(first) and finite(second) and finite(state)
    assert second["loss/lm"] < first["loss/lm"]  # the same batch twice
    model_config = ModelConfig.of(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == model_config.parameters()
    assert all(
        first[f"router/{measure}"].shape == (2,) for measure in ("max_load", "experts_per_token")
    )
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), initial_state(model_config).params, state.params
    )
    assert all(jax.tree.leaves(moved)), moved  # nothing is out of reach of the gradient


def assert_same_steps(name_or_config, expected, found):
    """Metrics and the change of the initial state are the same.

    Each step sums over 512 tokens. For each of them, forward and backward, two layers have five
    sums over widths of at most 32.
    """
    config = debug_config(name_or_config) if isinstance(name_or_config, str) else name_or_config
    (history, state), (history_found, state_found) = expected, found
    terms = len(history) * (512 + 2 * 2 * 5 * 32)
    for step, (one, other) in enumerate(zip(history, history_found, strict=True)):
        tolerance.assert_close(other, one, terms, label=f"step {step}: ")
    start = initial_state(ModelConfig.of(config)).params
    tolerance.assert_same_change(start, state_found.params, state.params, terms, len(history))
    tolerance.assert_close(state_found.replace(params={}), state.replace(params={}), terms)


@pytest.mark.parametrize(
    "name",
    [
        "aoe",
        "combinations.erc_mpi",
        "competesmoe",
        "routing_free",
        "combinations.erc_sigmoid",
        "xmoe",
    ],
)
def test_every_kind_of_router_takes_the_same_steps_on_another_mesh(name, token_batch):
    name = f"configs.{name}"
    assert_same_steps(
        name, *(two_steps(name, mesh_shape, token_batch) for mesh_shape in ((1, 1), (2, 4)))
    )


@pytest.mark.parametrize("name", [name for name in NAMES if any(part in name for part in VARIANTS)])
def test_the_step_of_a_variant_is_traced(name, token_batch):
    config, mesh = debug_config(name), sharding.make_mesh(2, 4)
    model, optimizer = Transformer(ModelConfig.of(config), mesh), optax.sgd(1.0)
    shapes = where_it_lies(model.config, (2, 4))
    step = make_train_step(
        model, Objective(config.losses.to_dict(), model), optimizer, 2, shardings(shapes)
    )
    _, metrics = jax.eval_shape(step, shapes, token_batch(16, config.data.sequence_length))
    expected = {f"loss/{term}" for term, options in config.losses.items() if options.weight > 0} | {
        "loss/total"
    }
    assert {metric for metric in metrics if metric.startswith("loss/")} == expected


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in NAMES if "ablations" not in name])
def test_every_config_takes_the_same_steps_on_another_mesh(name, token_batch):
    assert_same_steps(
        name, *(two_steps(name, mesh_shape, token_batch) for mesh_shape in ((1, 1), (2, 4)))
    )


def test_every_loss_is_the_same_on_another_mesh(token_batch):
    config = get_config("configs.combinations.erc_shared_experts", "debug")
    config.model.init_std = 0.1  # so that outputs overlap
    config.model.experts_per_token = 2  # so that there are pairs
    for loss in (*LAYER_LOSSES, "router_z", "router_orthogonality", "simbal"):
        config.losses[loss].weight = 0.01
    batch = token_batch(16, config.data.sequence_length)
    results = (
        take_steps(config, mesh_shape, batch, 1, micro_batches=1) for mesh_shape in ((1, 1), (2, 4))
    )
    assert_same_steps(config, *results)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", ["aoe", "routing_free", "shared_experts", "xmoe"])
def test_the_optimizers_take_every_routers_parameters(name, optimizer):
    config = get_config(f"configs.{name}", "debug")
    config.optimizer.name = optimizer
    model = Transformer(ModelConfig.of(config), sharding.make_mesh(1, 1))
    chain = make_optimizer(OptimizerConfig(**config.optimizer), config.train.steps, model.config)
    state = jax.eval_shape(initializer(model, chain, 0))
    updates, _ = jax.eval_shape(chain.update, state.params, state.opt_state, state.params)
    assert jax.tree.map(lambda leaf: leaf.shape, updates) == jax.tree.map(
        lambda leaf: leaf.shape, state.params
    )


@pytest.mark.parametrize("name", [
    "vanilla",
    "competesmoe",
    *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("aoe", "xmoe", "routing_free")),
])  # fmt: skip
def test_bfloat16_keeps_parameters_in_float32(name, token_batch):
    config = get_config(f"configs.{name}", "debug")
    config.model.dtype = "bfloat16"
    for loss in LAYER_LOSSES if name == "vanilla" else ():
        config.losses[loss].weight = 1e-3
    config.routers.competition.rate = 1.0  # where there is a competition, it takes place
    (metrics,), state = take_steps(config, (1, 2), token_batch(8, config.data.sequence_length), 1)
    assert finite(metrics) and finite(state)
    leaves = jax.tree.leaves((state.params, state.router, state.loss_scales))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
