"""Where every array lives: the two mesh axes and the one table of PartitionSpecs.

Tokens are split over both axes; experts over "expert"; large parameters, and with them every optimizer moment, over
"data" as well (FSDP). Expert matrices are cut there along their hidden axis F, so that sums over F need no gather.
"""

import math

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

DATA, EXPERT = "data", "expert"
BATCH = (DATA, EXPERT)

# parameter name -> spec of its trailing axes; leading axes (layers) are never split, other names are replicated
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
}


def make_mesh(data, expert):
    """A (data, expert) mesh; `data` = -1 takes the devices that `expert` leaves."""
    devices = jax.device_count()
    if expert < 1 or devices % expert:
        raise ValueError(f"mesh.expert: {devices} devices cannot be split over {expert}; use a divisor of {devices}")
    data = devices // expert if data == -1 else data
    if data < 1 or data * expert > devices:
        raise ValueError(f"mesh: {data} x {expert} needs {data * expert} devices, there are {devices}; lower mesh.data")
    shape, names = (data, expert), (DATA, EXPERT)
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: math.prod(shape)])


def shard_state(mesh, abstract_state):
    """The same tree with a sharding for every leaf: moments carry their parameter's name, so the table covers both."""

    def place(path, leaf):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        spec = PARAMETERS.get(names[-1], P()) if names else P()
        spec = P(*(None,) * (len(leaf.shape) - len(spec)), *spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def shard_batch(mesh):
    """Sequences are split over every device."""
    return NamedSharding(mesh, P(BATCH))


def put_batch(mesh, batch):
    """This process's rows of a batch, as global arrays."""
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(shard_batch(mesh), leaf), batch)


def check(mesh, model, batch_size, micro_batches, eval_batch_size):
    """Refuses sizes that the mesh cannot split evenly, naming both numbers."""
    data, expert = mesh.shape[DATA], mesh.shape[EXPERT]
    if model.experts % expert:
        raise ValueError(
            f"model.experts: {model.experts} experts cannot be split over {expert} devices of axis '{EXPERT}'"
        )
    for name, size in (("width", model.width), ("expert_width", model.expert_width)):
        if size % data:
            raise ValueError(f"model.{name}: {size} cannot be split over {data} devices of axis '{DATA}'")
    if micro_batches < 1 or batch_size % micro_batches:
        raise ValueError(
            f"train.batch_size: {batch_size} sequences cannot be split into {micro_batches} train.micro_batches"
        )
    for name, size in (("train.batch_size", batch_size // micro_batches), ("eval.batch_size", eval_batch_size)):
        if size < 1 or size % mesh.size:
            raise ValueError(
                f"{name}: {size} sequences at a time cannot be split over {mesh.size} devices; use a multiple"
            )
