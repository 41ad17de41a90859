"""The embedded corpus: real text that every installation already holds; nothing is downloaded.

It is made of the source files of the running interpreter and of the core dependencies. The domains
`stdlib_code`, `numeric_code` and `ml_code` are code; `prose` is English, and the docstrings of one
module are one document of it. The text depends on the installed versions, which are its identity.
The licences of the text are PSF, BSD and Apache-2.0.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence

from moe_erc.checks import BadInput
from moe_erc.data import bars
from moe_erc.data.document import Account, Document, divided_by_hash, split_by_hash
from moe_erc.data.python_source import SourceTree, separate, source_files

NAME = "embedded"
_VALIDATION_FRACTION = 0.02


def documents(trees: Sequence[SourceTree]) -> Iterator[Document]:
    """Every document of the trees once, training documents first; equal texts are one document.

    The documents of a split are in the order of a hash of their text, so that those of one domain
    or one library do not lie side by side.
    """
    found = _read(trees)
    digests: dict[str, list[str]] = {"train": [], "validation": []}
    for digest, (_, text) in found.items():
        digests[split_by_hash(text, _VALIDATION_FRACTION)].append(digest)
    for split, members in digests.items():
        for digest in sorted(members, key=functools.partial(_place, split)):
            domain, text = found[digest]
            yield Document(split, domain, text)


def account() -> Account:
    """How the corpus is divided."""
    return Account(divided_by_hash("installed source", _VALIDATION_FRACTION), {})


def _read(trees: Sequence[SourceTree]) -> dict[str, tuple[str, bytes]]:
    """{digest of the text: (domain, text)}; the first of equal texts is kept."""
    files = []
    for tree in trees:
        for _, path in source_files(tree):
            files.append((tree, path))
    found: dict[str, tuple[str, bytes]] = {}
    for tree, path in bars.over(files, "Reading installed source", len(files), "files"):
        try:
            code, prose = separate(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError):
            # Some files cannot be read or decoded, or are not Python of this version, such as
            # templates.
            continue
        for domain, text in ((tree.domain, code), ("prose", prose)):
            if text.strip():
                found.setdefault(hashlib.sha256(text).hexdigest(), (domain, text))
    if not found:
        raise BadInput(
            f"data.sources: '{NAME}' found no Python source under {trees[0].directory}; "
            "name another source"
        )
    return found


def _place(split: str, digest: str) -> str:
    """The key by which the documents of a split are sorted."""
    return hashlib.md5(f"{split}{digest}".encode(), usedforsecurity=False).hexdigest()
