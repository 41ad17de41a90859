"""Random keys by name: every use of randomness has a key of its own.

    key of a use = fold_in(key, first 32 bits of SHA-256 of the name)

Numbers cannot serve as names: `fold_in(key, 0)` is `split(key, n)[0]`, so that two uses that count
from 0 would draw the same.
"""

import hashlib

import jax


def named(key: jax.Array, name: str) -> jax.Array:
    """The typed key of the use `name`, the same on every platform and in every Python."""
    digest = hashlib.sha256(name.encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], "big"))
