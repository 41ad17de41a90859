"""Whether a checkpoint holds what a restore takes from it: every array with its shape, its type and all of its chunks.

orbax writes each process's arrays apart and merges their indices in the end. Parts that the merge
did not see are on the disk, with right digests, and in no index: such a checkpoint is complete by
its name, and nothing can be restored. Only indices are read here, no array.
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
    """Sorted [(shape, name of the dtype)] of the leaves of a state.

    A typed key lies on the disk as its integers.
    """
    return sorted(
        (tuple(leaf.shape), leaf.dtype.name)
        for leaf in jax.tree.leaves(jax.eval_shape(_keys_as_integers, state))
    )


def find_gap(step_directory: epath.Path, expected: list | None = None) -> str:
    """What of a checkpoint cannot be restored, in a few words; "" if all of it can.

    expected: what `shapes_on_disk` gave for the state that was saved; None compares with the
    checkpoint's own list.
    """
    try:
        json.loads((step_directory / META / "metadata").read_text(encoding="utf-8"))
        arrays = jax.tree.leaves(
            ocp.PyTreeCheckpointHandler().metadata(step_directory / STATE).tree
        )
        held = _count_chunks(step_directory / STATE)
    except Exception as error:  # whatever a library raises here, it would raise at a restore
        said = " ".join(str(error).split())[:LONGEST]
        return f"it cannot be restored: {said or type(error).__name__}"
    found = sorted((tuple(array.shape), array.dtype.name) for array in arrays)
    if expected is not None and found != expected:
        return f"it has {len(found)} arrays of {len(expected)}, or other shapes and types than were saved"
    for array in arrays:
        chunks = math.prod(
            -(-size // part)
            for size, part in zip(array.shape, array.storage.chunk_shape, strict=True)
        )
        if held[array.name] != chunks:
            return f"{array.name} has {held[array.name]} chunks of {chunks}"
    return ""


def _keys_as_integers(state):
    def stored(leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(stored, state)


def _count_chunks(directory):
    """{name of an array: chunks in the index}."""
    if is_remote(directory):
        bucket, _, path = str(directory).partition("://")[2].partition("/")
        base = {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}
    else:
        base = {"driver": "file", "path": f"{directory}/"}
    index = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    names = [key.decode().rpartition("/") for key in index.list().result()]
    return collections.Counter(name for name, _, chunk in names if not chunk.startswith("."))
