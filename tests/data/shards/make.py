"""Writes token shards of `texts.json` with the field's writers, and reads them with its readers.

    python tests/data/shards/make.py

It runs from the root of the repository. It needs datatrove, torch, megatron-core and ai2-olmo-core,
so that the tests that read the shards need none of them. `expected.json` holds the ids and the ends
of documents that each format's own reader finds.

Folders without a suffix hold uint16 of real text. Those that end in `_wide` hold ids of four bytes
that are beyond 65,535.
"""

import json
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.tokens import DocumentTokenizer, MegatronDocumentTokenizer
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile
from datatrove.pipeline.tokens.tokenizer import TokenizedFile
from datatrove.utils.dataset import DatatroveFileDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from olmo_core.data.utils import iter_document_indices, load_array_slice_into_tensor

from moe_erc.data import bpe
from moe_erc.data.tokenizer import END_OF_DOCUMENT

HERE = Path("tests/data/shards")
TOKENIZER = HERE / "tokenizer.json"
END = END_OF_DOCUMENT[0]
VOCABULARY = 320
WIDE_END = 100_257  # the end of a document in the vocabulary of OLMo 2
# The documents of two shards. One is a single word, one is longer than a short window.
TEXTS = json.loads((HERE / "texts.json").read_text(encoding="utf-8"))
WIDE = ([100_000, 65_536, 1, WIDE_END], [70_000, WIDE_END], [0, 99_999, 65_535, 2, 3, WIDE_END])


def main() -> None:
    """Write everything again."""
    texts = [text for shard in TEXTS for text in shard]
    bpe.save(bpe.train(texts, VOCABULARY), TOKENIZER)
    expected = {
        "datatrove_ds": _datatrove("datatrove_ds"),
        "datatrove_ds_wide": _datatrove_wide("datatrove_ds_wide"),
        "megatron": _megatron("megatron"),
        "megatron_wide": _megatron_wide("megatron_wide"),
    }
    narrow = expected["datatrove_ds"].values()
    end_id = next(iter(narrow))["tokens"][-1]
    shards = [np.array(shard["tokens"], np.uint16) for shard in narrow]
    expected["olmo_npy"] = _olmo("olmo_npy", shards, end_id)
    wide = [np.concatenate(WIDE).astype(np.uint32)]
    expected["olmo_npy_wide"] = _olmo("olmo_npy_wide", wide, WIDE_END)
    (HERE / "expected.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")


def _datatrove(folder: str) -> dict:
    for rank, documents in enumerate(_documents()):
        writer = DocumentTokenizer(
            str(HERE / folder), str(TOKENIZER), eos_token=END, shuffle_documents=False
        )
        writer.run(documents, rank, len(TEXTS))
    return _read_datatrove(folder, token_size=2)


def _datatrove_wide(folder: str) -> dict:
    file = TokenizedFile(
        str(HERE / folder),
        "00000_unshuffled.ds",
        tokenizer_name_or_path="allenai/dolma2-tokenizer",
        save_final_metadata=True,
        token_size=4,
    )
    for ids in WIDE:
        file.write(ids, None)
    file.close()
    return _read_datatrove(folder, token_size=4)


def _read_datatrove(folder: str, token_size: int) -> dict:
    found = {}
    for path in sorted((HERE / folder).glob("*.ds")):
        length = path.stat().st_size // token_size
        reader = DatatroveFileDataset(str(path), length - 1, token_size, return_positions=True)
        tokens = reader[0]["input_ids"].tolist()
        positions = reader[0]["positions"].tolist()
        starts = [place for place, position in enumerate(positions) if position == 0]
        found[path.name] = {"tokens": tokens, "document_ends": [*starts[1:], length]}
    return found


def _megatron(folder: str) -> dict:
    for rank, documents in enumerate(_documents()):
        writer = MegatronDocumentTokenizer(
            str(HERE / folder), tokenizer_name_or_path=str(TOKENIZER), eos_token=END
        )
        writer.run(documents, rank, len(TEXTS))
    return _read_megatron(folder)


def _megatron_wide(folder: str) -> dict:
    file = MegatronTokenizedFile(str(HERE / folder), "00000_tokens", token_size=4)
    for ids in WIDE:
        file.write(ids)
    file.close()
    return _read_megatron(folder)


def _read_megatron(folder: str) -> dict:
    found = {}
    for path in sorted((HERE / folder).glob("*.bin")):
        reader = IndexedDataset(str(path.with_suffix("")))
        sequences = [reader[number].tolist() for number in range(len(reader))]
        lengths = [len(sequence) for sequence in sequences]
        ends = np.concatenate([[0], np.cumsum(lengths)])[reader.document_indices[1:]]
        tokens = [token for sequence in sequences for token in sequence]
        found[path.name] = {"tokens": tokens, "document_ends": ends.tolist()}
    return found


def _olmo(folder: str, shards: list[np.ndarray], end_id: int) -> dict:
    """Arrays as the guide of OLMo-core writes them: np.memmap, so a .npy without a header."""
    (HERE / folder).mkdir(exist_ok=True)
    found = {}
    for number, tokens_N in enumerate(shards):
        path = HERE / folder / f"part-{number}-00000.npy"
        file = np.memmap(path, tokens_N.dtype, mode="w+", shape=tokens_N.shape)
        file[:] = tokens_N
        file.flush()
        kind = tokens_N.dtype.type
        read = load_array_slice_into_tensor(path, 0, len(tokens_N), kind)
        places = iter_document_indices(path, eos_token_id=end_id, dtype=kind)
        ends = [int(end) for _, end in places]
        found[path.name] = {"tokens": read.tolist(), "document_ends": ends}
    return found


def _documents() -> list[list[Document]]:
    shards = []
    for number, texts in enumerate(TEXTS):
        shards.append([Document(text, f"{number}/{place}") for place, text in enumerate(texts)])
    return shards


if __name__ == "__main__":
    main()
