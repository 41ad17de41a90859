"""Where a run was made: devices, mesh and versions, as plain JSON for its report."""

import importlib.metadata
import platform
from typing import Any

import jax
from jax.sharding import Mesh

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")


def environment(mesh: Mesh) -> dict[str, Any]:
    """{"kind", "devices", "mesh", "processes", "versions"} of a run on that mesh."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "kind": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "versions": {"python": platform.python_version(), **versions},
    }
