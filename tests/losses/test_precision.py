"""Which precision the program asks for, and what "auto" means at published sizes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.compiled import costs
from configs import base
from moe_erc import coupling_matrix, erc_loss, sharding
from moe_erc.diagnosis.coupling import measure_coupling
from moe_erc.losses.objective import Objective
from moe_erc.losses.precision import PRECISIONS, erc_flops, erc_share, resolve
from moe_erc.model.config import ModelConfig
from moe_erc.model.transformer import Transformer

L, E, D, F = 2, 4, 8, 6
SHAPES = {"router": (L, E, D), "w_gate": (L, E, D, F), "w_up": (L, E, D, F), "w_down": (L, E, F, D)}
PARAMS = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}


def asked_for(function, *arguments):
    """The precisions, of both operands, of all matmuls that the compiler is given."""
    text = jax.jit(function).lower(*arguments).as_text()
    matmuls = [line for line in text.splitlines() if "dot_general" in line]
    assert matmuls
    found = [re.search(r"precision = \[(\w+), (\w+)\]", line) for line in matmuls]
    return {name for match in found for name in (match.groups() if match else ("DEFAULT",))}


OPTIONS = (
    {},
    {"noise": "expected", "normalize": True},
    {"activation": "swiglu"},
    {"activation": "output"},
)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_matmul_of_the_loss_and_its_gradient_has_the_precision_asked_for(options, precision):
    key, mesh = jax.eval_shape(lambda: jax.random.key(0)), sharding.make_mesh(2, 2)

    def sharded(params, rng):
        return erc_loss(params, rng, mesh=mesh, precision=precision, **options)

    def single(params, rng):
        return erc_loss(params, rng, precision=precision, **options)

    for loss in (single, sharded):
        assert asked_for(jax.value_and_grad(loss), PARAMS, key) == {precision.upper()}


def test_the_loss_alone_takes_three_passes_and_the_diagnosis_all_of_float32():
    key, mesh = jax.eval_shape(lambda: jax.random.key(0)), sharding.make_mesh(2, 2)
    assert asked_for(erc_loss, PARAMS, key) == {"HIGH"}
    router_LED, w_gate_LEDF = PARAMS["router"], PARAMS["w_gate"]
    of_layer = (
        jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in (router_LED, w_gate_LEDF)
    )
    assert asked_for(coupling_matrix, *of_layer) == {"HIGHEST"}
    over_mesh = lambda *arrays: coupling_matrix(*arrays, mesh)  # noqa: E731
    assert asked_for(over_mesh, router_LED, w_gate_LEDF) == {"HIGHEST"}
    assert asked_for(measure_coupling, router_LED, w_gate_LEDF) == {"HIGHEST"}


def test_a_precision_that_does_not_exist_is_refused():
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    for mesh in (None, sharding.make_mesh(1, 1)):
        for word in ("higher", "auto"):  # what a step costs is unknown here
            with pytest.raises(
                ValueError, match=f"precision: '{word}' is not one of default, high, highest"
            ):
                erc_loss(params, jax.random.key(0), precision=word, mesh=mesh)


def published(size):
    config = base.get_config(size)
    return ModelConfig.of(config), (config.train.batch_size, config.data.sequence_length)


def test_auto_is_high_where_that_is_less_than_a_two_thousandth_of_a_step():
    # ERC takes E^2 / (3 K N) of the experts' forward pass. At 3b this is
    # 64^2 / (3 8 3.1M) = 5.4e-5, at 15b 256^2 / (3 8 3.1M) = 8.7e-4. "high" has three passes, ERC
    # has three products as the step has, and the experts are about half of the model.
    chosen = {
        size: resolve("auto", *of_size(size)) for size in ("debug", "olmoe_1b_7b", "3b", "15b")
    }
    assert chosen == {"debug": "default", "olmoe_1b_7b": "high", "3b": "high", "15b": "default"}
    assert erc_share(*of_size("3b")) == pytest.approx(0.9e-4, rel=0.1)
    assert erc_share(*of_size("15b")) == pytest.approx(1.2e-3, rel=0.1)
    config, _, shape_BT = of_size("15b")
    assert (
        resolve("high", config, "gate", shape_BT) == "high"
        and resolve("auto", config, "gate", None) == "high"
    )
    # The share grows with the number of the experts' matrices that the activation reads.
    assert erc_share(config, "output", shape_BT) == pytest.approx(
        3 * erc_share(config, "gate", shape_BT)
    )


def of_size(size):
    config, shape_BT = published(size)
    return config, "gate", shape_BT


@pytest.mark.optimized
@pytest.mark.parametrize("activation", ["gate", "swiglu"])
def test_the_flops_of_auto_are_those_of_the_compiled_program(model_config, activation):
    config = model_config(layers=L, experts=E, width=D, heads=2, expert_width=F)
    loss = jax.value_and_grad(lambda params, rng: erc_loss(params, rng, activation=activation))
    program = jax.jit(loss).lower(PARAMS, jax.eval_shape(lambda: jax.random.key(0))).compile()
    assert costs.cost(program.as_text()).flops == erc_flops(config, activation)


def test_the_objective_resolves_auto_by_the_batch_of_the_step(model_config):
    erc = base.get_config("debug").losses.erc.to_dict() | {"weight": 1.0}
    assert erc["precision"] == "auto"
    goal = Objective({"erc": erc}, Transformer(model_config()))
    moe = jax.tree.map(
        np.float32, {"router": np.ones((2, 4, 32)), "w_gate": np.ones((2, 4, 32, 16))}
    )

    def program(shape_BT):
        def terms(params, rng):
            return goal.of_parameters(params, rng, shape_BT)

        return asked_for(terms, {"layers": {"moe": moe}}, jax.random.key(0))

    assert program((8, 32)) == {"DEFAULT"}
    assert program((2**20, 32)) == {"HIGH"}
