"""The mesh, the table of specs, and sizes that cannot be split."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_erc import sharding
from moe_erc.training.state import TrainState


def test_data_takes_what_expert_leaves():
    assert dict(sharding.make_mesh(-1, 2).shape) == {"data": 4, "expert": 2}
    assert dict(sharding.make_mesh(2, 1).shape) == {"data": 2, "expert": 1}


@pytest.mark.parametrize(
    "data, expert, numbers",
    [
        (-1, 3, ["8", "3"]),
        (3, -1, ["8", "3"]),
        (16, 1, ["16", "8"]),
        (0, 1, ["0"]),
        (1, 0, ["0"]),
        (-1, -1, ["-1"]),
    ],
)
def test_a_mesh_that_the_devices_do_not_make_is_refused(data, expert, numbers):
    with pytest.raises(ValueError) as refusal:
        sharding.make_mesh(data, expert)
    assert all(number in str(refusal.value) for number in numbers)


def test_expert_groups_stay_within_a_slice():
    devices = [
        types.SimpleNamespace(slice_index=index % 2, platform="cpu", device_kind="cpu", id=index)
        for index in range(8)
    ]
    slices_DE = [[device.slice_index for device in row] for row in sharding.lay_out(devices, 4, 2)]
    # The data axis crosses the slow network once, the expert axis never.
    assert slices_DE == [
        [0, 0],
        [0, 0],
        [1, 1],
        [1, 1],
    ]
    with pytest.raises(ValueError, match=r"mesh.data: 1 .* 2 slices"):
        sharding.lay_out(devices, 1, 8)


def test_a_mesh_that_leaves_a_process_without_devices_is_refused():
    devices = [types.SimpleNamespace(process_index=index // 2) for index in range(8)]
    with pytest.raises(ValueError, match=r"mesh: 2 x 2 .* process 2"):
        sharding.make_mesh(2, 2, devices)


@pytest.mark.parametrize(
    "experts, expert_width, shape",
    [(16, 64, (1, 8)), (2, 64, (4, 2)), (2, 6, (2, 2)), (3, 9, (1, 1))],
)
def test_what_was_trained_elsewhere_finds_a_mesh(experts, expert_width, shape):
    model = types.SimpleNamespace(experts=experts, expert_width=expert_width, width=48, kv_width=16)
    assert tuple(sharding.fit_mesh(model).shape.values()) == shape


def router_parameters(config):
    return config.router.parameters(config)


def test_the_plan_counts_what_a_device_holds(model_config, capsys):
    mesh, leaf = sharding.make_mesh(2, 4), jax.ShapeDtypeStruct((3, 4, 8, 8), jnp.float32)
    params = {
        "layers": {"moe": {"w_gate": leaf, "router": jax.ShapeDtypeStruct((3, 4, 8), jnp.float32)}}
    }
    count = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(count, params, (params, params), count, {}, {}, {})
    abstract = sharding.shard_state(mesh, state, router_parameters(model_config()))
    # A device holds 3 layers x 1 of 4 experts x 8 x 4 of 8 hidden units, and 3 x 4 x 8 router
    # weights. The moments of the router have 4 of its columns.
    assert sharding.bytes_per_device(abstract.params) == 4 * (96 + 96)
    assert sharding.bytes_per_device(abstract.opt_state) == 2 * 4 * (96 + 48)
    sharding.print_plan(abstract)
    printed = capsys.readouterr().out
    assert "layers.moe.w_gate" in printed and "-,expert,-,data" in printed and "moments" in printed


def test_moments_lie_where_their_parameters_lie_and_the_routers_are_split_too(model_config):
    leaf, count = (
        jax.ShapeDtypeStruct((3, 4, 8, 8), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    params = {"layers": {"moe": {"w_gate": leaf, "w_down": leaf, "router": leaf}}}
    state = TrainState(
        count, params, ({"mu": params}, count), count, {"bias": count}, {"load_balance": count}, {}
    )
    placed = sharding.shard_state(
        sharding.make_mesh(2, 2), state, router_parameters(model_config())
    )
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, placed)
    experts = {"w_gate": P(None, "expert", None, "data"), "w_down": P(None, "expert", "data", None)}
    assert specs.params["layers"]["moe"] == experts | {"router": P(*(None,) * 4)}
    assert specs.opt_state[0]["mu"]["layers"]["moe"] == experts | {
        "router": P(None, None, None, "data")
    }
    assert (
        specs.step
        == specs.opt_state[1]
        == specs.router["bias"]
        == specs.loss_scales["load_balance"]
        == P()
    )


@pytest.mark.parametrize("change, words", [
    ({"experts": 6}, ["model.experts", "6", "4", "expert"]),
    ({"width": 33}, ["model.width", "33", "2", "data"]),
    ({"kv_width": 5}, ["model.kv_heads", "5", "2"]),
    ({"expert_width": 7}, ["model.expert_width", "7", "2"]),
    ({"batch_size": 12}, ["train.batch_size", "12", "8"]),
    ({"batch_size": 16, "micro_batches": 3}, ["16", "3", "micro"]),
    ({"eval_batch_size": 4}, ["eval.batch_size", "4", "8"]),
])  # fmt: skip
def test_sizes_that_do_not_divide_are_refused_with_both_numbers(change, words):
    sizes = {
        "experts": 4,
        "width": 32,
        "kv_width": 16,
        "expert_width": 16,
        "batch_size": 16,
        "micro_batches": 1,
        "eval_batch_size": 8,
    }
    sizes |= change
    model = types.SimpleNamespace(
        **{name: sizes[name] for name in ("experts", "width", "kv_width", "expert_width")}
    )
    with pytest.raises(ValueError) as refusal:
        sharding.check(
            sharding.make_mesh(2, 4),
            model,
            sizes["batch_size"],
            sizes["micro_batches"],
            sizes["eval_batch_size"],
        )
    assert all(word in str(refusal.value) for word in words)


def test_stages_by_hand():
    # Eight devices: x counts planes of 2 x 2. Devices 0 and 1 are a line.
    coordinates = [(x, y, z) for x in range(2) for y in range(2) for z in range(2)]
    assert sharding.length_of_line(coordinates) == 2
    assert sharding.length_of_line([(x, 0, 0) for x in range(4)]) == 4
    across, along = sharding.in_two_stages(8, 2)
    assert across == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert along == ((0, 1), (2, 3), (4, 5), (6, 7))


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 8)], ids=str)
def test_devices_without_a_torus_have_one_stage(shape):
    assert sharding.scatter_stages(sharding.make_mesh(*shape)) == (None,)


@pytest.mark.parametrize(
    "shape, slices, expected", [((8, 1), 1, 2), ((4, 2), 1, 1), ((8, 1), 2, 1)], ids=str
)
def test_only_a_whole_torus_has_two_stages(shape, slices, expected):
    devices = []
    for number in range(8):
        coordinates = (number // 4, number // 2 % 2, number % 2)
        slice_index = number * slices // 8
        devices.append(types.SimpleNamespace(coords=coordinates, slice_index=slice_index))
    data, expert = shape
    mesh = types.SimpleNamespace(
        shape={"data": data, "expert": expert}, size=8, devices=np.array(devices).reshape(shape)
    )
    assert len(sharding.scatter_stages(mesh)) == expected
