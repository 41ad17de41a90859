"""Token shards as a source: files of token ids that tools of the field wrote, read where they lie.

`source.open_shards` finds the shards of a pattern, checks them and makes token streams of them. One
file a format says what its files hold. `storage.py` reads ranges of bytes from a local disk or an
object store. Nothing here tokenises.
"""

PREFIX = "tokens:"  # of a source that is a pattern of shards


def is_pattern(source: str) -> bool:
    """Whether a source is a pattern of shards, such as "tokens:/data/dolma/*.npy"."""
    return source.startswith(PREFIX)
