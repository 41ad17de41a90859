"""The embedded corpus: real text that every installation already holds, so that nothing is downloaded.

The source files of the running interpreter and of the core dependencies, as code (`stdlib_code`, `numeric_code`,
`ml_code`) and as English (`prose`: the docstrings of one module are one document). It depends on the installed
versions, hence a directory per set of versions, and `manifest.json` in it with the sha256 of every source file.
Licences of the text: PSF, BSD, Apache-2.0.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds

from moe_erc.checks import BadInput
from moe_erc.data import bars, cache
from moe_erc.data.document import split_by_hash
from moe_erc.data.python_source import Root, separate, source_files, versions

MANIFEST = "manifest.json"
_VALIDATION_FRACTION = 0.02


class EmbeddedCorpus(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Documents of the given source trees, without duplicates, split by the hash of their text."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "Initial release."}
    # Where TFDS would look for checksums of downloads: there are none, and looking needs importlib_resources.
    code_path = None

    def __init__(self, *, roots: Sequence[Root], **builder_arguments):
        self._roots = tuple(roots)
        super().__init__(**builder_arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict({"text": text, "domain": text, "path": text, "sha256": text})
        return tfds.core.DatasetInfo(builder=self, description=__doc__, features=features)

    def _split_generators(self, dl_manager) -> dict[str, Iterator[tuple[str, dict]]]:
        del dl_manager  # nothing is downloaded
        examples, manifest = {}, {}
        files = [(root, name, path) for root in self._roots for name, path in source_files(root)]
        for root, name, path in bars.over(files, "Reading installed source", len(files), "files"):
            try:
                source = path.read_bytes()
                code, prose = separate(source)
            except (OSError, SyntaxError, ValueError, RecursionError):
                continue  # unreadable, undecodable or not of this Python version (templates, tests of the parser)
            manifest[name] = hashlib.sha256(source).hexdigest()
            for domain, text in ((root.domain, code), ("prose", prose)):
                digest = hashlib.sha256(text).hexdigest()
                if text.strip():  # of equal texts the first is kept
                    examples.setdefault(digest, {"text": text, "domain": domain, "path": name, "sha256": digest})
        if not examples:
            raise BadInput(
                f"data.sources: 'embedded' found no Python source under {self._roots[0].directory}; name another source"
            )
        # TFDS points data_path at a temporary directory here: manifest and data appear together or not at all.
        (self.data_path / MANIFEST).write_text(
            json.dumps({"versions": versions(self._roots), "files": manifest}, indent=1), encoding="utf-8"
        )
        return {split: self._generate_examples(examples, split) for split in ("train", "validation")}

    def _generate_examples(self, examples: dict[str, dict], split: str) -> Iterator[tuple[str, dict]]:
        for digest, example in examples.items():
            if split_by_hash(example["text"], _VALIDATION_FRACTION) == split:
                yield digest, example


def directory(cache_root: Path, roots: Sequence[Root]) -> Path:
    """Where the corpus of these versions is kept: two environments that share a cache do not share a corpus."""
    python = versions(roots).get("stdlib", "other")
    return cache_root / "embedded" / f"python-{python}-{cache.digest(versions(roots))}"
