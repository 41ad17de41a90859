"""Small files that several processes share: a reader sees the old one or the new one, never a part.

`diagnosis.report.write_text` is for scripts that train: it asks jax for the number of the process,
and so takes the devices, which a study leaves to its runs.
"""

import pathlib
import secrets


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes the file; its directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of several machines, which share the directory, may have one number.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
