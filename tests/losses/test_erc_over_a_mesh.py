"""ERC over a mesh: loss, gradients, and what the program computes and sends on 8 devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.compiled import costs
from moe_erc import coupling_matrix, erc_loss, sharding
from tests.tolerance import assert_close

L, E, D, F = 2, 16, 24, 32
MESHES = [(1, 1), (8, 1), (1, 8), (2, 4), (4, 2)]


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {
        "router": (L, E, D),
        "w_gate": (L, E, D, F),
        "w_up": (L, E, D, F),
        "w_down": (L, E, F, D),
    }
    return {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def value_and_grad(loss):
    return jax.jit(jax.value_and_grad(lambda params: loss(params, jax.random.key(1))))


def assert_equal(expected, found):
    assert_close(found, expected, terms=D + F)  # sums over D and F in another order


VARIANTS = (
    {"noise": "expected"},
    {"normalize": True, "layer_reduction": "sum"},
    {"noise": "none", "activation": "swiglu"},
    {"activation": "output", "detach_router": True},
)


@pytest.fixture(scope="module")
def on_one_device(params):
    """Loss and gradients with some options, computed once for all meshes."""

    @functools.cache
    def compute(options):
        return value_and_grad(
            lambda params, rng: erc_loss(params, rng, alpha=0.5, **dict(options))
        )(params)

    return compute


@pytest.mark.parametrize(
    "shape, options", [*((s, {}) for s in MESHES), *(((2, 4), o) for o in VARIANTS)], ids=str
)
def test_any_mesh_gives_the_loss_and_the_gradients_of_one_device(
    on_one_device, params, shape, options
):
    mesh = sharding.make_mesh(*shape)
    expected = on_one_device(tuple(options.items()))
    found = value_and_grad(
        lambda params, rng: erc_loss(params, rng, mesh=mesh, alpha=0.5, **options)
    )(params)
    assert expected[0] > 0
    assert_equal(expected, found)


def test_one_layer_draws_from_the_key_itself(params):
    layer = {name: leaf[0] for name, leaf in params.items()}
    mesh = sharding.make_mesh(2, 4)
    found = value_and_grad(lambda params, rng: erc_loss(params, rng, mesh=mesh))(layer)
    assert_equal(value_and_grad(erc_loss)(layer), found)


def test_the_matrix_over_a_mesh_is_the_matrix(params):
    found = coupling_matrix(params["router"], params["w_gate"], sharding.make_mesh(4, 2))
    expected = [
        coupling_matrix(params["router"][layer], params["w_gate"][layer]) for layer in range(L)
    ]
    assert_equal(jnp.stack(expected), found)


def test_words_that_erc_does_not_know_are_refused_over_a_mesh_too(params):
    mesh = sharding.make_mesh(2, 4)
    with pytest.raises(ValueError, match="gaussian"):
        erc_loss(params, jax.random.key(0), noise="gaussian", mesh=mesh)
    with pytest.raises(ValueError, match="rng"):
        erc_loss(params, None, mesh=mesh)
    with pytest.raises(TypeError, match="alfa"):
        erc_loss(params, jax.random.key(0), alfa=0.5, mesh=mesh)


def test_a_mesh_of_other_than_two_axes_is_refused(params):
    with pytest.raises(ValueError, match=r"mesh has the axes \(expert\); ERC needs two"):
        erc_loss(params, jax.random.key(0), mesh=jax.make_mesh((8,), ("expert",)))


def test_alpha_may_be_traced(params):
    def slope(loss):
        return jax.jit(jax.grad(lambda alpha: loss(params, jax.random.key(1), alpha=alpha)))(0.5)

    over_mesh = functools.partial(erc_loss, mesh=sharding.make_mesh(2, 4))
    # The slope is a sum over pairs, of one sign.
    assert_close(slope(over_mesh), slope(erc_loss), terms=D + F + E * E)


@functools.cache
def program(loss, shape, sizes=(L, E, D, F)):
    """The program for parameters placed as the trainer places them; gradients lie as they do."""
    mesh, (layers, experts, width, hidden) = sharding.make_mesh(*shape), sizes
    shapes = {"router": (layers, experts, width), "w_gate": (layers, experts, width, hidden)}
    leaves = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    placed = sharding.shard_state(mesh, leaves)
    everywhere, lies = NamedSharding(mesh, P()), jax.tree.map(lambda leaf: leaf.sharding, placed)
    outputs = (everywhere, lies) if loss is both else everywhere
    key = jax.eval_shape(lambda: jax.random.key(0))
    return (
        jax.jit(lambda params, rng: loss(params, rng, mesh), out_shardings=outputs)
        .lower(placed, key)
        .compile()
    )


def value(params, rng, mesh):
    return erc_loss(params, rng, mesh=mesh)


def both(params, rng, mesh):
    return jax.value_and_grad(value)(params, rng, mesh)


@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (2, 4), (4, 2)], ids=str)
def test_what_crosses_devices_is_e_squared_over_ep_and_the_router_gradient(shape):
    data, expert = shape
    crossing = [
        collective
        for collective in costs.cost(program(both, shape).as_text()).collectives
        if collective.group > 1
    ]
    sent = sorted(
        (size, collective.group)
        for collective in crossing
        for size in map(floats, collective.shapes)
    )
    assert {collective.times for collective in crossing} == {1}
    # S and its diagonal, one sum each for all layers.
    over_data = [(L * E * (E // expert), data), (L * (E // expert), data)]
    # The bounds, the bars of the hinge and their gradient are sent, and the loss.
    over_expert = [(L * E, expert)] * 3 + [(L, expert)]
    everywhere = [(L * E * D, 8)]  # the gradient of the router
    expected = over_data * (data > 1) + over_expert * (expert > 1) + everywhere
    assert sent == sorted(expected)


def floats(shape):
    """ "f32[2,16]" is 32."""
    assert shape.startswith("f32["), shape
    return int(np.prod([int(size) for size in shape[4:].rstrip("]").split(",") if size]))


@pytest.mark.parametrize("shape", MESHES[1:], ids=str)
def test_flops_are_divided_by_both_axes(shape):
    # M has one product of every row with every expert and two gradients. The diagonal comes first,
    # one product of every row with its own expert and the gradient of the row.
    matmul = 2 * L * E**2 * D * F // 8
    assert costs.cost(program(value, shape).as_text()).flops == matmul
    found = costs.cost(program(both, shape).as_text()).flops
    assert found == 3 * matmul + 2 * matmul // E


def test_xla_counts_the_same_where_its_count_has_no_loop():
    # The local experts of the one layer make one group. XLA counts all operations: the matmul and a
    # little more.
    experts, width, hidden = 16, 512, 64
    matmul = 2 * experts**2 * width * hidden / 8
    counted = program(value, (2, 4), (1, experts, width, hidden)).cost_analysis()["flops"]
    # Most of the rest is the draw of the noise, 50 / 256 of the matmul.
    assert matmul <= counted <= 1.3 * matmul
