"""Where the sums of ERC are taken: on one device, or over a (data, expert) mesh.

    S[:, own j] = sum over "data" of |proxy @ w_gate[own j, :, own slice of F]|^2

Over a mesh every device computes 1 / (dp ep) of the FLOPs. Expert matrices stay where FSDP puts
them, P(expert, None, data): none is gathered, and their gradient is local. Per layer, these cross
devices: the (E, E / ep) sum and its diagonal over data; E bounds, E diagonal values, E gradients of
bars and the scalar over expert; and the (E, D) gradient of the router.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_erc.checks import BadInput


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that share the work: those of a mesh, or one device where `mesh` is None.

    On one device every sum is complete, and every expert is its own.
    """

    mesh: Mesh | None = None

    def __post_init__(self):
        if self.mesh is not None and len(self.mesh.axis_names) != 2:
            axes = ", ".join(map(str, self.mesh.axis_names))
            raise BadInput(f"mesh has the axes ({axes}); ERC needs two: (data, expert)")

    @property
    def data_axis(self) -> str | None:
        """The name of the axis over which F is split."""
        return None if self.mesh is None else self.mesh.axis_names[0]

    @property
    def expert_axis(self) -> str | None:
        """The name of the axis over which experts are split."""
        return None if self.mesh is None else self.mesh.axis_names[1]

    @property
    def split_data(self) -> bool:
        """Whether F is split over several devices."""
        return self.mesh is not None and self.mesh.shape[self.data_axis] > 1

    def run(
        self, function: Callable, out_spec: P, rows_LED: jax.Array, weights: dict, keys: Any
    ) -> jax.Array:
        """function(rows, weights, keys), on every device with its own slices of the weights.

        weights: by name, w_gate and w_up (L, E, D, F), w_down (L, E, F, D).
        out_spec: how the results of the devices are put together.

        Rows and keys lie whole on every device.
        """
        if self.mesh is None:
            return function(rows_LED, weights, keys)
        slices = {
            "w_gate": P(None, self.expert_axis, None, self.data_axis),
            "w_up": P(None, self.expert_axis, None, self.data_axis),
            "w_down": P(None, self.expert_axis, self.data_axis),
        }
        in_specs = (P(), {name: slices[name] for name in weights}, P())
        over_mesh = jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_spec)
        return over_mesh(rows_LED, weights, keys)

    def own_experts(self, experts: int, own: int) -> jax.Array:
        """(J,): the numbers of the `own` experts of this device, among all `experts`."""
        first = 0 if self.mesh is None else lax.axis_index(self.expert_axis) * own
        return first + jnp.arange(experts)[:own]

    def sum_over_data(self, slices: jax.Array) -> jax.Array:
        """The sum over the slices of F."""
        return slices if self.mesh is None else lax.psum(slices, self.data_axis)

    def sum_over_experts(self, terms: jax.Array) -> jax.Array:
        """The sum over the devices of one slice of F."""
        return terms if self.mesh is None else lax.psum(terms, self.expert_axis)

    def as_own(self, tree: Any) -> Any:
        """The same values, as each device's own, so that their gradient is summed once."""
        return tree if self.mesh is None else _vary(tree, self.mesh.axis_names)

    def as_own_of_experts(self, tree: Any) -> Any:
        """The same values, as own to the devices of one slice of F, which have one gradient."""
        return tree if self.mesh is None else _vary(tree, (self.expert_axis,))


def _vary(tree, axes):
    def own(leaf):
        return lax.pcast(leaf, axes, to="varying")

    return jax.tree.map(own, tree)
