"""Every config builds at every size, and runs two steps at :debug with the loss it is named for."""

import importlib
import pathlib

import jax
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

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = pathlib.Path(__file__).parents[1]
NAMES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "configs").rglob("*.py")
    if path.stem not in ("__init__", "base", "sizes")
)


def keys(config, prefix=""):
    for name, value in config.items():
        yield from keys(value, f"{prefix}{name}.") if hasattr(value, "items") else [prefix + name]


@pytest.mark.parametrize("size", sizes.MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_whole_at_every_size_and_adds_no_key(name, size):
    config = importlib.import_module(name).get_config(size)
    assert set(keys(config)) == set(keys(base.get_config(size)))
    ModelConfig(**config.model), DataConfig(**config.data), OptimizerConfig(**config.optimizer)
    Objective(config.losses.to_dict())
    assert config.train.batch_size % config.train.micro_batches == 0
    assert config.model.experts % config.mesh.expert == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_config_says_how_it_is_run(name):
    path = name.replace(".", "/") + ".py"
    assert f"python train.py --config={path}" in importlib.import_module(name).__doc__


def test_no_size_is_tiny_and_an_unknown_one_is_refused():
    assert base.get_config() == base.get_config("tiny")
    with pytest.raises(ValueError, match=r"huge.*debug, tiny"):
        base.get_config("huge")


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_at_debug(name, token_batch):
    config = importlib.import_module(name).get_config("debug")
    mesh = sharding.make_mesh(1, 1)
    model, objective = Transformer(ModelConfig(**config.model), mesh), Objective(config.losses.to_dict(), mesh)
    optimizer = make_optimizer(OptimizerConfig(**config.optimizer), config.train.steps)
    init = initializer(model, optimizer, config.seed)
    shapes = abstract_state(init, mesh)
    state = create_state(init, shapes)
    step = make_train_step(model, objective, optimizer, config.train.micro_batches, shardings(shapes))
    batch = sharding.put_batch(mesh, token_batch(config.train.batch_size, config.data.sequence_length))
    state, first = step(state, batch)
    state, second = step(state, batch)
    expected = {f"loss/{term}" for term, options in config.losses.items() if options.weight > 0} | {"loss/total"}
    assert {metric for metric in first if metric.startswith("loss/")} == expected
    assert all(jax.numpy.isfinite(value) for value in second.values())
    assert second["loss/lm"] < first["loss/lm"]  # the same batch twice
    assert ("loss/erc" in first) == (name != "configs.vanilla")
