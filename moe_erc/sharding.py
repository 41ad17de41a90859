"""Where every array lives: the two mesh axes and the table of PartitionSpecs.

Tokens are split over both axes, and experts over "expert". Large parameters, and with them every
optimizer moment, are split over "data" as well (FSDP). Expert matrices are split over "data" along
their hidden axis F, so that sums over F need no gather. A router says itself where its parameters
lie (`moe/routers/base.py`).
"""

import math
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_erc.checks import BadInput
from moe_erc.tables import print_table

DATA = "data"
EXPERT = "expert"
BATCH = (DATA, EXPERT)

# {parameter name: spec of its trailing axes}. Leading axes (layers) are never split, and parameters
# of other names are replicated.
PARAMETERS = {
    "embed": P(None, DATA),
    "head": P(None, DATA),
    "query": P(None, DATA),
    "key": P(None, DATA),
    "value": P(None, DATA),
    "output": P(DATA, None),
    "w_gate": P(EXPERT, None, DATA),
    "w_up": P(EXPERT, None, DATA),
    "w_down": P(EXPERT, DATA, None),
    "w_high": P(EXPERT, None, DATA),
    "shared_gate": P(None, DATA),
    "shared_up": P(None, DATA),
    "shared_down": P(DATA, None),
}


def use_cpu_cores(*divisible: int) -> None:
    """Makes one virtual CPU device per core, as many as divide all the sizes given.

    It must be called before any array is made. XLA runs the loops of a program on one core per
    device. Where several processes share the cores, each takes one. A number that was set from
    outside stays; other platforms ignore it.
    """
    is_set = jax.config.jax_num_cpu_devices > 0
    if is_set or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    # A size that is not positive is refused where it is used. Of no sizes the divisor is 0, which
    # every number divides.
    common_divisor = math.gcd(*[size for size in divisible if size > 0])
    devices = _cores()
    while common_divisor % devices:
        devices -= 1
    jax.config.update("jax_num_cpu_devices", devices)


def _cores() -> int:
    """The cores that this process may use for itself."""
    if jax.distributed.is_initialized():
        return 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_mesh(data: int, expert: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, expert) mesh of `devices`, of all devices by default.

    One of the two sizes may be -1: it takes what the other leaves. BadInput for sizes that the
    devices do not allow, and for a mesh that leaves a process without a device.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    for name, size, other in ((DATA, data, expert), (EXPERT, expert, data)):
        if size == 0 or size < -1 or (size == -1 and (other < 1 or count % other)):
            raise BadInput(
                f"mesh.{name}: {size} beside {other} cannot split {count} devices; "
                "use divisors, or one -1"
            )
    if data == -1:
        data = count // expert
    elif expert == -1:
        expert = count // data
    if data * expert > count:
        raise BadInput(
            f"mesh: {data} x {expert} needs {data * expert} devices, there are {count}; "
            "lower mesh.data"
        )
    chosen = devices[: data * expert]
    processes = {device.process_index for device in devices}
    idle = processes - {device.process_index for device in chosen}
    if idle:
        raise BadInput(
            f"mesh: {data} x {expert} of {count} devices leaves process {min(idle)} none; "
            "use all devices"
        )
    return Mesh(lay_out(chosen, data, expert), (DATA, EXPERT), axis_types=(AxisType.Auto,) * 2)


def platform_of(mesh: Mesh | None) -> str:
    """The platform that programs over `mesh` are compiled for: cpu, gpu or tpu."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def scatter_stages(mesh: Mesh | AbstractMesh) -> tuple:
    """Groups of the data axis: to sum and cut over the axis, do so in one stage after another.

    One stage is (None,), the axis as it is. Over a whole torus libtpu compiles a reduce-scatter as
    an all-reduce, which sends twice the bytes, and cuts the result. Over a part of a torus it stays
    a reduce-scatter: over planes first, then over the lines across them.
    """
    if isinstance(mesh, AbstractMesh) or mesh.shape[EXPERT] > 1 or mesh.size == 1:
        return (None,)
    devices = mesh.devices.flatten()
    is_one_slice = len({getattr(device, "slice_index", 0) for device in devices}) == 1
    if not hasattr(devices[0], "coords") or not is_one_slice:
        return (None,)
    line = length_of_line([device.coords for device in devices])
    return in_two_stages(mesh.size, line) if line < mesh.size else (None,)


def length_of_line(coordinates: Sequence[Sequence[int]]) -> int:
    """How many of these devices, from the first on, lie on one line of the torus."""
    moved = set()
    for place, of_device in enumerate(coordinates):
        for axis, (found, first) in enumerate(zip(of_device, coordinates[0], strict=True)):
            if found != first:
                moved.add(axis)
        if len(moved) > 1:
            return place
    return len(coordinates)


def in_two_stages(size: int, line: int) -> tuple:
    """Groups of an axis of `size`: those a line apart, then the neighbours of a line.

    In this order the slices lie as after one stage.
    """
    across = []
    for start in range(line):
        across.append(tuple(range(start, size, line)))
    along = []
    for start in range(0, size, line):
        along.append(tuple(range(start, start + line)))
    return tuple(across), tuple(along)


def fit_mesh(model: Any) -> Mesh:
    """A mesh of as many devices as divide the sizes of a ModelConfig.

    It serves a model that was trained on another machine.
    """
    expert = math.gcd(model.experts, jax.device_count())
    data = math.gcd(jax.device_count() // expert, model.width, model.kv_width, model.expert_width)
    return make_mesh(data, expert)


def lay_out(devices: Sequence[jax.Device], data: int, expert: int) -> np.ndarray:
    """A (data, expert) array of devices, near ones beside each other.

    An expert group stays within a slice, which is what the fast network joins: one TPU slice, one
    GPU node. `jax.make_mesh` is not used because it knows no slices, and because it refuses to
    split an axis of the torus (8 x 8 on 4x4x4).
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if data % slices:
        raise BadInput(
            f"mesh.data: {data} cannot be split over {slices} slices, and an expert group stays "
            "within one; use a multiple"
        )
    if slices > 1:
        within_slice = (data // slices, expert)
        over_slices = (slices, 1)
        return mesh_utils.create_hybrid_device_mesh(
            within_slice, over_slices, devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_device_mesh((data, expert), devices, allow_split_physical_axes=True)


def shard_state(
    mesh: Mesh, abstract_state: Any, router_parameters: Mapping = MappingProxyType({})
) -> Any:
    """The same tree, with a sharding for every leaf.

    router_parameters: {name: Parameter} of `moe/routers/base.py`.

    Optimizer moments carry the name of their parameter, so the name decides for both. Leaves that
    neither the table nor the router names are replicated.
    """
    parameters = dict(PARAMETERS)
    moments = dict(PARAMETERS)
    for name, parameter in router_parameters.items():
        parameters[name] = parameter.placement
        moments[name] = parameter.placement if parameter.moments is None else parameter.moments

    def place(path, leaf):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        table = moments if jax.tree_util.GetAttrKey("opt_state") in path else parameters
        trailing = table.get(names[-1], P()) if names else P()
        leading = (None,) * (len(leaf.shape) - len(trailing))
        sharding = NamedSharding(mesh, P(*leading, *trailing))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def print_plan(abstract: Any) -> None:
    """Prints where an abstract state will lie.

    A table lists shape, spec and bytes per device of every parameter, and the totals.
    """
    leaves = jax.tree_util.tree_leaves_with_path(abstract.params)
    mesh = leaves[0][1].sharding.mesh
    title = f"{mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {dict(mesh.shape)}"
    rows = []
    for path, leaf in leaves:
        spec = ",".join(axis or "-" for axis in leaf.sharding.spec)
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        shape = ",".join(map(str, leaf.shape))
        rows.append((name, shape, spec, f"{bytes_per_device(leaf) / 1e6:,.2f}"))
    parameters = abstract.params
    moments = abstract.opt_state
    totals = {"parameters": parameters, "moments": moments, "together": (parameters, moments)}
    footer = []
    for name, tree in totals.items():
        footer.append((name, "", "", f"{bytes_per_device(tree) / 1e6:,.2f}"))
    print_table(title, ("parameter", "shape", "spec", "MB a device"), rows, footer)


def bytes_per_device(abstract: Any) -> int:
    """The bytes that one device holds of a tree of abstract arrays with shardings."""
    total = 0
    for leaf in jax.tree.leaves(abstract):
        elements = math.prod(leaf.sharding.shard_shape(leaf.shape))
        total += elements * leaf.dtype.itemsize
    return total


def shard_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its sequences are split over all devices."""
    return NamedSharding(mesh, P(BATCH))


def shard_cache(mesh: Mesh) -> NamedSharding:
    """The sharding of a cache: keys and values lie with their sequences; axis 0 counts layers."""
    return NamedSharding(mesh, P(None, BATCH))


def replicate(mesh: Mesh) -> NamedSharding:
    """The sharding of what lies whole on every device, so that every process can fetch it."""
    return NamedSharding(mesh, P())


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that lie on this process's devices, in order.

    No row lies on two devices, wherever the devices are.
    """
    indices = shard_batch(mesh).addressable_devices_indices_map((batch_size,))
    rows = []
    for (share,) in indices.values():
        rows += range(*share.indices(batch_size))
    return sorted(rows)


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """A batch as global arrays, made of the `local_rows` that every process gives."""

    def place(leaf):
        return jax.make_array_from_process_local_data(shard_batch(mesh), leaf)

    return jax.tree.map(place, batch)


def put_whole_batch(mesh: Mesh, batch: Any) -> Any:
    """A batch as global arrays, where every process gives all of it: a device takes its rows."""

    def place(leaf):
        return jax.make_array_from_process_local_data(shard_batch(mesh), leaf, leaf.shape)

    return jax.tree.map(place, batch)


def check(
    mesh: Mesh, model: Any, batch_size: int, micro_batches: int, eval_batch_size: int
) -> None:
    """Refuses sizes that the mesh cannot split evenly, naming both numbers."""
    data = mesh.shape[DATA]
    expert = mesh.shape[EXPERT]
    if model.experts % expert:
        raise BadInput(
            f"model.experts: {model.experts} experts cannot be split over {expert} devices "
            f"of axis '{EXPERT}'"
        )
    for name, size in (
        ("width", model.width),
        ("kv_heads", model.kv_width),
        ("expert_width", model.expert_width),
    ):
        if size % data:
            raise BadInput(
                f"model.{name}: a width of {size} cannot be split over {data} devices "
                f"of axis '{DATA}'"
            )
    if micro_batches < 1 or batch_size % micro_batches:
        raise BadInput(
            f"train.batch_size: {batch_size} sequences cannot be split into "
            f"{micro_batches} train.micro_batches"
        )
    for name, size in (
        ("train.batch_size", batch_size // micro_batches),
        ("eval.batch_size", eval_batch_size),
    ):
        if size < 1 or size % mesh.size:
            raise BadInput(
                f"{name}: {size} sequences at a time cannot be split over {mesh.size} devices; "
                "use a multiple"
            )
