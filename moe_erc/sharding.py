"""Where every array lives: the two mesh axes and the table of PartitionSpecs; a router says its own.

Tokens are split over both axes; experts over "expert"; large parameters, and with them every
optimizer moment, over "data" as well (FSDP). Expert matrices are cut there along their hidden axis
F, so that sums over F need no gather.
"""

import math
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_erc.checks import BadInput
from moe_erc.tables import print_table

DATA = "data"
EXPERT = "expert"
BATCH = (DATA, EXPERT)

# parameter name -> spec of its trailing axes; leading axes (layers) are never split, other names
# are replicated
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
    """Before any array: a virtual CPU device per core, as many as divide all the sizes given.

    XLA runs the loops of a program on one core per device. Several processes share the cores: each
    takes one. A number set from outside stays, other platforms ignore it.
    """
    if jax.config.jax_num_cpu_devices > 0 or "host_platform_device_count" in os.environ.get(
        "XLA_FLAGS", ""
    ):
        return
    sizes = [
        size for size in divisible if size > 0
    ]  # what is not positive is refused where it is used
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    cores = 1 if jax.distributed.is_initialized() else cores
    devices = max(
        count for count in range(1, cores + 1) if all(size % count == 0 for size in sizes)
    )
    jax.config.update("jax_num_cpu_devices", devices)


def make_mesh(data: int, expert: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, expert) mesh.

    -1, for one of the two, takes what the other leaves of `devices` (all there are).
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    for name, size, other in ((DATA, data, expert), (EXPERT, expert, data)):
        if size == 0 or size < -1 or (size == -1 and (other < 1 or count % other)):
            raise BadInput(
                f"mesh.{name}: {size} beside {other} cannot split {count} devices; use divisors, or one -1"
            )
    data, expert = (
        count // expert if data == -1 else data,
        count // data if expert == -1 else expert,
    )
    if data * expert > count:
        raise BadInput(
            f"mesh: {data} x {expert} needs {data * expert} devices, there are {count}; lower mesh.data"
        )
    chosen = devices[: data * expert]
    if idle := {device.process_index for device in devices} - {
        device.process_index for device in chosen
    }:
        raise BadInput(
            f"mesh: {data} x {expert} of {count} devices leaves process {min(idle)} none; use all devices"
        )
    return Mesh(lay_out(chosen, data, expert), (DATA, EXPERT), axis_types=(AxisType.Auto,) * 2)


def fit_mesh(model: Any) -> Mesh:
    """A mesh of as many devices as divide the sizes of `model`, for what was trained on another machine."""
    expert = math.gcd(model.experts, jax.device_count())
    data = math.gcd(jax.device_count() // expert, model.width, model.kv_width, model.expert_width)
    return make_mesh(data, expert)


def lay_out(devices: Sequence[jax.Device], data: int, expert: int) -> np.ndarray:
    """(data, expert) array of devices with near ones beside each other; an expert group stays within its slice.

    A slice is what the fast network joins: one TPU slice, one GPU node. As `jax.make_mesh`, which
    knows no slices and refuses to split an axis of the torus (8 x 8 on 4x4x4).
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if data % slices:
        raise BadInput(
            f"mesh.data: {data} cannot be split over {slices} slices, and an expert group stays within one; "
            "use a multiple"
        )
    if slices > 1:
        shape = (data // slices, expert), (slices, 1)
        return mesh_utils.create_hybrid_device_mesh(*shape, devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh((data, expert), devices, allow_split_physical_axes=True)


def shard_state(
    mesh: Mesh, abstract_state: Any, router_parameters: Mapping = MappingProxyType({})
) -> Any:
    """The same tree with a sharding for every leaf: moments carry their parameter's name, so a name tells for both.

    router_parameters: {name: Parameter} of `moe/routers/base.py`. Every device has all of what
    neither names.
    """
    parameters = dict(PARAMETERS)
    moments = dict(PARAMETERS)
    for name, parameter in router_parameters.items():
        parameters[name] = parameter.placement
        moments[name] = parameter.placement if parameter.moments is None else parameter.moments

    def place(path, leaf):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        table = moments if jax.tree_util.GetAttrKey("opt_state") in path else parameters
        spec = table.get(names[-1], P()) if names else P()
        spec = P(*(None,) * (len(leaf.shape) - len(spec)), *spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def print_plan(abstract: Any) -> None:
    """Prints where an abstract state will lie: shape, spec and bytes per device of every parameter, and the totals."""
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
    footer = [
        (name, "", "", f"{bytes_per_device(tree) / 1e6:,.2f}") for name, tree in totals.items()
    ]
    print_table(title, ("parameter", "shape", "spec", "MB a device"), rows, footer)


def bytes_per_device(abstract: Any) -> int:
    """What one device holds of a tree of abstract arrays with shardings."""
    leaves = jax.tree.leaves(abstract)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )


def shard_batch(mesh: Mesh) -> NamedSharding:
    """Sequences are split over every device."""
    return NamedSharding(mesh, P(BATCH))


def shard_cache(mesh: Mesh) -> NamedSharding:
    """Keys and values lie with their sequences, behind the axis of layers."""
    return NamedSharding(mesh, P(None, BATCH))


def replicate(mesh: Mesh) -> NamedSharding:
    """All of it on every device, so that every process can fetch it."""
    return NamedSharding(mesh, P())


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that lie on this process's devices: no row is on two of them, wherever the devices are."""
    slices = shard_batch(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted(row for (share,) in slices for row in range(*share.indices(batch_size)))


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """The `local_rows` of a batch, from every process, as global arrays."""
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(shard_batch(mesh), leaf), batch
    )


def put_whole_batch(mesh: Mesh, batch: Any) -> Any:
    """A batch that every process has all of, as global arrays: each device takes its rows."""
    place = jax.make_array_from_process_local_data
    return jax.tree.map(lambda leaf: place(shard_batch(mesh), leaf, leaf.shape), batch)


def check(
    mesh: Mesh, model: Any, batch_size: int, micro_batches: int, eval_batch_size: int
) -> None:
    """Refuses sizes that the mesh cannot split evenly, naming both numbers."""
    data = mesh.shape[DATA]
    expert = mesh.shape[EXPERT]
    if model.experts % expert:
        raise BadInput(
            f"model.experts: {model.experts} experts cannot be split over {expert} devices of axis '{EXPERT}'"
        )
    for name, size in (
        ("width", model.width),
        ("kv_heads", model.kv_width),
        ("expert_width", model.expert_width),
    ):
        if size % data:
            raise BadInput(
                f"model.{name}: a width of {size} cannot be split over {data} devices of axis '{DATA}'"
            )
    if micro_batches < 1 or batch_size % micro_batches:
        raise BadInput(
            f"train.batch_size: {batch_size} sequences cannot be split into {micro_batches} train.micro_batches"
        )
    for name, size in (
        ("train.batch_size", batch_size // micro_batches),
        ("eval.batch_size", eval_batch_size),
    ):
        if size < 1 or size % mesh.size:
            raise BadInput(
                f"{name}: {size} sequences at a time cannot be split over {mesh.size} devices; use a multiple"
            )
