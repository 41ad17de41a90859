"""The embedded corpus: real text that every installation already holds; nothing is downloaded.

The source files of the running interpreter and of the core dependencies, as code (`stdlib_code`,
`numeric_code`, `ml_code`) and as English (`prose`: the docstrings of one module are one document).
The text depends on the installed versions, which are its identity. Licences of the text: PSF, BSD,
Apache-2.0.
"""

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

    Within a split documents are in the order of a hash of their text: those of one domain or one
    library do not lie side by side.
    """
    found = _read(trees)
    digests: dict[str, list[str]] = {"train": [], "validation": []}
    for digest, (_, text) in found.items():
        digests[split_by_hash(text, _VALIDATION_FRACTION)].append(digest)
    for split, members in digests.items():
        for digest in sorted(members, key=lambda digest, split=split: _place(split, digest)):
            domain, text = found[digest]
            yield Document(split, domain, text)


def account() -> Account:
    """How the corpus is divided."""
    return Account(divided_by_hash("installed source", _VALIDATION_FRACTION), {})


def _read(trees: Sequence[SourceTree]) -> dict[str, tuple[str, bytes]]:
    """{digest of the text: (domain, text)}; of equal texts the first is kept."""
    files = [(tree, path) for tree in trees for _, path in source_files(tree)]
    found: dict[str, tuple[str, bytes]] = {}
    for tree, path in bars.over(files, "Reading installed source", len(files), "files"):
        try:
            code, prose = separate(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError):
            # Unreadable, undecodable or not of this Python version: templates, tests of the parser.
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
    """The place of a document among those of its split, by which it is sorted."""
    return hashlib.md5(f"{split}{digest}".encode(), usedforsecurity=False).hexdigest()
