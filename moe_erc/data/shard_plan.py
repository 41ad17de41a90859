"""Which text is tokenised into which folder of token shards, decided before any text is read.

Every source gives one part for each of its splits. A part is one folder of shards. A source
without a held-out split gives two parts of the same files: each takes its documents by their hash.
"""

import dataclasses
import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import fsspec

from moe_erc.checks import BadInput
from moe_erc.data import embedded, file_tree, paths, planted, text_files, tfds_source
from moe_erc.data import tokenizer as tokenizers
from moe_erc.data.config import DataConfig
from moe_erc.data.shards import is_pattern
from moe_erc.data.sources import label_of

# How the files of each suffix are read.
KINDS = {
    ".txt": "text",
    ".jsonl": "text",
    ".json": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".warc": "warc",
    ".wet": "warc",
}
FILES = text_files.Readable(
    suffixes=tuple(KINDS),
    compressions=(".gz", ".zst", ".bz2", ".xz"),
    noun=".txt, .jsonl, .parquet, .arrow or .warc file",
)
RECORD = "logs/plan.json"  # in the output
_SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Part:
    """The text of one split of one source."""

    source: str  # as configured
    label: str  # of the source, as the name of a directory
    split: str  # "train" or "validation"
    place: str  # the directory or URL that the files lie in, or the directory of a TFDS data set
    files: tuple[tuple[str, int], ...]  # (path below `place`, bytes); () for TFDS
    records: tuple[tuple[str, int], ...]  # (split of the TFDS data set, documents in it)
    held_out: float | None  # share of the documents that is held out by hash; None where names say

    @property
    def folder(self) -> str:
        """Where its shards lie, below the output."""
        return f"{self.label}/{self.split}"

    @property
    def most_tasks(self) -> int:
        """The number of tasks that the part can be divided among: a file is read by one."""
        files = [len(listed) for listed in by_kind(self.files).values()]
        return max(files) if files else sum(count for _, count in self.records)


def parts_of(config: DataConfig) -> Iterator[Part]:
    """The parts of all sources of a configuration; TFDS data sets are prepared.

    Raises:
      BadInput: for a source without text, and for one that needs no shards.
    """
    taken = set()
    for name in config.sources:
        parts = list(_parts(name, config))
        first = parts[0].label
        label = first
        number = 2
        while label in taken:
            label = f"{first}_{number}"
            number = number + 1
        taken.add(label)
        for part in parts:
            yield dataclasses.replace(part, label=label)


def suffix(path: str) -> str:
    """The suffix of a file that is read, without its compression."""
    return FILES.suffix(path.rsplit("/", 1)[-1])


def by_kind(files: Iterable[Sequence]) -> dict[str, list[Sequence]]:
    """{kind: (path, bytes) of its files}.

    Of every kind, the task of number n reads the files n, n + tasks, n + 2 tasks and so on.
    """
    found: dict[str, list[Sequence]] = {}
    for file in files:
        found.setdefault(KINDS[suffix(file[0])], []).append(file)
    return found


def tokenizer_files(spec: str, tokenizer: tokenizers.Tokenizer) -> dict[str, bytes]:
    """{name: content} of the files that make the same tokenizer in any directory.

    There are none for "bytes". The end of a document is written beside a tokenizer.json that does
    not name it.
    """
    if spec == tokenizers.ByteTokenizer.identity:
        return {}
    content = paths.local(spec).read_bytes()
    files = {"tokenizer.json": content}
    with tempfile.TemporaryDirectory() as directory:
        alone = Path(directory) / "tokenizer.json"
        alone.write_bytes(content)
        try:
            tokenizers.load(str(alone))
        except BadInput:
            end = json.dumps({"eos_token": tokenizer.eos})
            files["tokenizer_config.json"] = end.encode()
    return files


def record(
    parts: list[Part], config: DataConfig, tokenizer: tokenizers.Tokenizer, tasks: int
) -> dict:
    """Everything that decides the bytes of the shards, as plain JSON."""
    everything = {
        "tasks": tasks,
        "tokenizer": tokenizer.identity,
        "text_key": config.text_key,
        "parts": [dataclasses.asdict(part) for part in parts],
    }
    return json.loads(json.dumps(everything))


def check_same(before: object, now: dict, completed: Collection[int], output: str) -> None:
    """Refuse to go on with shards that were begun from other text or in another way.

    A file that no completed task has read may have changed: someone has mended it.
    """
    words = {
        "tasks": "another --tasks",
        "tokenizer": "another data.tokenizer",
        "text_key": "another data.text_key",
        "parts": "other text (data.sources, data.validation_fraction, or files that have changed)",
    }
    for key, said in words.items():
        is_known = isinstance(before, dict) and key in before
        if not is_known or _decided(before, key, completed) != _decided(now, key, completed):
            raise BadInput(
                f"--output: '{output}' was begun with {said}; "
                "repeat that command, or give a new directory"
            )


def _decided(record: Mapping, key: str, completed: Collection[int]) -> object:
    """The part of a record that must not change any more."""
    if key != "parts":
        return record[key]
    decided = []
    for part in record[key]:
        files = []
        for listed in by_kind(part["files"]).values():
            for number, (path, size) in enumerate(listed):
                is_read = number % record["tasks"] in completed
                files.append([path, size if is_read else None])
        decided.append(part | {"files": files})
    return decided


def _parts(name: str, config: DataConfig) -> Iterator[Part]:
    if name in (embedded.NAME, planted.NAME):
        raise BadInput(
            f"data.sources: {name!r} is made in memory and needs no shards; train on it as it is, "
            "or name a directory, an object store or a TFDS data set"
        )
    if is_pattern(name):
        raise BadInput(f"data.sources: {name!r} is tokens already; train on it as it is")
    if paths.is_remote(name):
        yield from _parts_of_files(name, name, _remote_entries(name), config)
        return
    path = paths.local(name)
    # Hugging Face saves a dataset_info.json too, and a state.json beside it.
    is_tfds = (path / "dataset_info.json").is_file() and not (path / "state.json").is_file()
    if path.is_dir() and not is_tfds:
        yield from _parts_of_files(name, str(path), file_tree.entries(path), config)
        return
    if name[0] in "/.~" and not is_tfds:
        raise BadInput(
            f"data.sources: no such directory '{name}'; give an existing directory, "
            "a URL such as s3://bucket/path, or a TFDS name such as 'c4/en'"
        )
    if is_tfds:
        builder = tfds_source.in_directory(path)
    else:
        builder = tfds_source.named(name, config.text_key)
    yield from _parts_of_tfds(name, builder, config)


def _parts_of_files(
    name: str, place: str, entries: Iterator[file_tree.Entry], config: DataConfig
) -> Iterator[Part]:
    label = label_of(place.rstrip("/").rpartition("/")[2])
    survey = text_files.divide(name, entries, config.validation_fraction, FILES)
    held_out = None if survey.has_own_splits else config.validation_fraction
    for split in _SPLITS:
        files = []
        for entry, of_split in survey.files:
            if of_split in (None, split):
                files.append((_listed("/".join(entry.parts)), entry.bytes))
        # Nothing is held out at the fraction 0.
        if split == "train" or held_out != 0:
            yield Part(name, label, split, place, tuple(files), (), held_out)


def _listed(path: str) -> str:
    """A path that can stand in a line of a list."""
    if path != path.strip() or not path.isprintable():
        raise BadInput(f"data.sources: {path!r} is no name that can be listed; rename that file")
    return path


def _parts_of_tfds(name: str, builder: tfds_source.Builder, config: DataConfig) -> Iterator[Part]:
    label = label_of(builder.info.full_name.rpartition("/")[0])
    tfds_source.check_text(builder, config.text_key)
    splits = tfds_source.splits(builder)
    tfds_source.check_splits(builder, splits)
    has_own_splits = len(set(splits.values())) > 1
    held_out = None if has_own_splits else config.validation_fraction
    for split in _SPLITS:
        records = []
        for of_builder, ours in splits.items():
            if ours == split or not has_own_splits:
                records.append((of_builder, builder.info.splits[of_builder].num_examples))
        if split == "train" or held_out != 0:
            place = str(builder.data_path)
            yield Part(name, label, split, place, (), tuple(records), held_out)


def _remote_entries(url: str) -> Iterator[file_tree.Entry]:
    """Every file below a URL, as `file_tree.entries` gives those of a directory."""
    try:
        file_system, root = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise BadInput(
            f"data.sources: {url!r} cannot be opened ({error}); "
            "install the package of fsspec for it, or give a directory"
        ) from None
    for path, info in file_system.find(root, detail=True).items():
        parts = tuple(path.removeprefix(root).strip("/").split("/"))
        is_hidden = any(part.startswith(".") for part in parts)
        ignored = file_tree.HIDDEN if is_hidden else ""
        yield file_tree.Entry(parts, "file", info["size"] or 0, parts, ignored)
