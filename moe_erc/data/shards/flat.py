"""Flat arrays, as OLMo-core and Dolma write them: every token of every document, end to end.

A `.npy` file of theirs is raw little-endian integers without a header. A `.npy` file of NumPy has a
header, which says the type. Documents are closed by a token.
"""

import io

import numpy as np

from moe_erc.checks import BadInput
from moe_erc.data.shards.base import Format, Shard
from moe_erc.data.shards.storage import File, Storage

_LONGEST_HEADER = 4096  # bytes; that of a flat array has 128
_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def open_shard(storage: Storage, file: File) -> Shard:
    """A flat array.

    BadInput for a NumPy header of anything but one line of integers.
    """
    head = storage.read(file.path, 0, min(file.size, _LONGEST_HEADER)).tobytes()
    if not head.startswith(np.lib.format.MAGIC_PREFIX):
        return Shard(file.path, 0, file.size, None, None, None)
    stream = io.BytesIO(head)
    try:
        shape, _, dtype = _READERS[np.lib.format.read_magic(stream)](stream)
    except Exception as error:  # a header is parsed as Python, and errors are of many kinds
        raise BadInput(
            f"data.sources: '{file.path}' has a NumPy header that cannot be read ({error}); "
            "write it again with numpy.save"
        ) from None
    if len(shape) != 1 or dtype.kind not in "iu":
        raise BadInput(
            f"data.sources: '{file.path}' holds {dtype} of shape {shape}; "
            "token shards are arrays of integers of one dimension"
        )
    stop = stream.tell() + shape[0] * dtype.itemsize
    if stop != file.size:
        raise BadInput(
            f"data.sources: '{file.path}' has {file.size:,} bytes, and its header says {stop:,}; "
            "it is cut off: copy it again"
        )
    return Shard(file.path, stream.tell(), stop, dtype, None, None)


FLAT = Format("flat array", ".npy", open_shard)
