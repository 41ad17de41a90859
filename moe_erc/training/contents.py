"""Whether a checkpoint holds what a restore needs: every array, its shape, type and chunks.

Orbax writes the arrays of each process apart and merges their indices in the end. Parts that the
merge did not see are on the disk, with right digests, but in no index. Such a checkpoint is
complete by its name, and yet nothing can be restored from it. Only indices are read here, no array.
"""

import collections
import json
import math
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from moe_erc.data.paths import is_remote

STATE = "state"
META = "meta"
LONGEST = 160  # characters of what a library says


def shapes_on_disk(state: Any) -> list[tuple[tuple[int, ...], str]]:
    """[(shape, name of the dtype)] of the leaves of a state as they lie on the disk, sorted.

    A typed key lies on the disk as its integers.
    """
    stored = jax.eval_shape(_keys_as_integers, state)
    return sorted((tuple(leaf.shape), leaf.dtype.name) for leaf in jax.tree.leaves(stored))


def find_gap(step_directory: epath.Path, expected: list | None = None) -> str:
    """What of a checkpoint cannot be restored, in a few words; "" if all of it can.

    expected: what `shapes_on_disk` gave for the state that was saved; None compares the checkpoint
        with its own list of arrays.
    """
    try:
        json.loads((step_directory / META / "metadata").read_text(encoding="utf-8"))
        metadata = ocp.PyTreeCheckpointHandler().metadata(step_directory / STATE)
        arrays = jax.tree.leaves(metadata.tree)
        held = _count_chunks(step_directory / STATE)
    # Whatever a library raises here, it would raise at a restore.
    except Exception as error:
        said = " ".join(str(error).split())[:LONGEST]
        return f"it cannot be restored: {said or type(error).__name__}"
    found = sorted((tuple(array.shape), array.dtype.name) for array in arrays)
    if expected is not None and found != expected:
        return (
            f"it has {len(found)} arrays of {len(expected)}, "
            "or other shapes and types than were saved"
        )
    for array in arrays:
        chunks = 1
        for size, part in zip(array.shape, array.storage.chunk_shape, strict=True):
            chunks *= math.ceil(size / part)
        if held[array.name] != chunks:
            return f"{array.name} has {held[array.name]} chunks of {chunks}"
    return ""


def _keys_as_integers(state):
    def stored(leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(stored, state)


def _count_chunks(directory):
    """{name of an array: number of its chunks in the index}."""
    if is_remote(directory):
        bucket, _, path = str(directory).partition("://")[2].partition("/")
        base = {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}
    else:
        base = {"driver": "file", "path": f"{directory}/"}
    index = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    counts = collections.Counter()
    for key in index.list().result():
        name, _, chunk = key.decode().rpartition("/")
        # Names that begin with a point are an array's description, not its chunks.
        if not chunk.startswith("."):
            counts[name] += 1
    return counts
