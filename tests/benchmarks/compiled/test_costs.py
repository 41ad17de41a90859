"""Costs read from compiled programs, on programs whose costs a human can count."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks.compiled import costs

FLOAT = jnp.float32
PROGRAMS = pathlib.Path(__file__).parent / "programs"


def cost_of(function, *shapes):
    """Cost of a function of float32 arrays."""
    arguments = [jax.ShapeDtypeStruct(shape, FLOAT) for shape in shapes]
    return costs.cost(jax.jit(function).lower(*arguments).compile().as_text())


@pytest.fixture(scope="module")
def on_mesh():
    """Cost of a function of one replicated array of this shape, run by 2 x 4 devices."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def cost(function, shape):
        return cost_of(
            jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False), shape
        )

    return cost


def repeated(function, times):
    """x -> function applied so often, in a loop."""
    return lambda x: lax.fori_loop(0, times, lambda _, x: function(x), x)


def test_matmul_flops():
    assert cost_of(jnp.matmul, (8, 16), (16, 32)).flops == 2 * 8 * 16 * 32
    assert (
        cost_of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (3, 8, 16), (3, 16, 32)).flops
        == 3 * 2 * 8 * 16 * 32
    )


def test_flops_in_nested_loops_are_multiplied_out():
    def inner(x):
        return lax.scan(lambda x, _: (x @ x, None), x, None, length=3)[0]

    program = jax.jit(repeated(inner, 5)).lower(jax.ShapeDtypeStruct((64, 64), FLOAT)).compile()
    assert costs.cost(program.as_text()).flops == 5 * 3 * 2 * 64**3
    # This is why the reader exists: XLA counts a loop's body once. If this assertion fails, XLA has
    # learned to count loops, and the reader's FLOPs can be removed.
    assert program.cost_analysis()["flops"] < 2 * 2 * 64**3


def test_a_loop_whose_length_depends_on_data_is_named_and_counted_once():
    def function(x):
        return lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x)

    cost = cost_of(function, (32, 32))
    assert cost.flops == 2 * 32**3
    assert len(cost.open_loops) == 1 and "while" in cost.open_loops[0]


def test_of_a_conditional_the_dearest_branch_counts():
    def function(x):
        return lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x)

    assert cost_of(function, (32, 32)).flops == 2 * 2 * 32**3


@pytest.mark.parametrize("function, kind, size, group, sent", [
    # 8 x 16 floats are 512 bytes. Each of 4 devices keeps a quarter and sends three quarters.
    (lambda x: lax.psum(x, "b"), "all-reduce", 512, 4, 2 * 3 / 4 * 512),
    (lambda x: lax.psum(x, ("a", "b")), "all-reduce", 512, 8, 2 * 7 / 8 * 512),
    (lambda x: lax.all_gather(x, "b"), "all-gather", 4 * 512, 4, 3 * 512),
    (lambda x: lax.psum_scatter(x, "b", tiled=True), "reduce-scatter", 512, 4, 3 / 4 * 512),
    (lambda x: lax.psum_scatter(x, "a", tiled=True), "reduce-scatter", 512, 2, 1 / 2 * 512),
    (lambda x: lax.all_to_all(x, "b", 0, 0, tiled=True), "all-to-all", 512, 4, 3 / 4 * 512),
    (lambda x: lax.ppermute(x, "b", [(0, 1), (1, 2), (2, 3), (3, 0)]), "collective-permute", 512, 8,
     512),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_collectives(on_mesh, function, kind, size, group, sent):
    (found,) = on_mesh(function, (8, 16)).collectives
    assert (found.kind, found.bytes, found.group, found.times) == (kind, size, group, 1)
    assert found.wire_bytes == pytest.approx(sent)


def test_collectives_in_a_loop_run_as_often_as_it_turns(on_mesh):
    cost = on_mesh(repeated(lambda x: lax.psum(jnp.sin(x), "b"), 5), (8, 16))
    (found,) = cost.collectives
    assert found.times == 5 and "psum" in found.origin
    assert cost.wire_bytes == 5 * 2 * 3 / 4 * 512


def test_memory_is_of_one_device_and_knows_of_donation():
    def step(x, y):
        return x + y

    shapes = [jax.ShapeDtypeStruct((1024,), FLOAT)] * 2
    kept, donated = (
        costs.memory(jax.jit(step, donate_argnums=donate).lower(*shapes).compile())
        for donate in ((), 0)
    )
    assert kept.arguments == 2 * 4096 and kept.outputs == 4096
    assert donated.aliased == 4096 and donated.allocated == kept.allocated - 4096


def test_what_only_tpu_programs_hold():
    """The text is cut from programs of libtpu 0.0.42.

    Its loops have no trip count, its dots are convolutions, and its collectives stand in fusions.
    """
    cost = costs.cost((PROGRAMS / "tpu.hlo").read_text())
    assert cost.flops == 12 * 2 * 16 * 64 * 32  # a batch of 12, written as a window
    assert cost.grouped_flops == 2 * 192 * 64 * 32
    assert not cost.open_loops and cost.kernels == ("jit(step)/own_kernel",)
    found = [
        (one.kind, one.bytes, one.group, one.asynchronous, one.times) for one in cost.collectives
    ]
    assert found == [
        ("all-gather", 16 * 8 * 2, 4, True, 12),
        ("reduce-scatter", 32 * 64 * 4, 4, False, 12),
        ("all-reduce", 32 * 64 * 4, 16, False, 12),
    ]


def test_asynchronous_collectives_count_once():
    """GPU programs have these forms of collectives; CPU programs do not."""
    found = [
        (one.kind, one.shapes, one.bytes, one.group, one.asynchronous)
        for one in costs.cost((PROGRAMS / "asynchronous.hlo").read_text()).collectives
    ]
    assert found == [
        ("all-gather", ("f32[128,64]",), 128 * 64 * 4, 4, True),
        ("all-reduce", ("f32[32,64]",), 32 * 64 * 4, 8, True),
        ("reduce-scatter", ("f32[8,64]",), 32 * 64 * 4, 4, True),
        ("collective-permute", ("pred[32,64]",), 32 * 64, 8, False),
    ]
