"""Byte-level byte-pair encoding, learned from the training documents of a configuration.

The 256 bytes are always in the vocabulary, so that every text can be encoded. Merges are added by
frequency until the vocabulary is full. The command is `python -m moe_erc.train_tokenizer`.
"""

import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moe_erc.checks import Range, in_range
from moe_erc.data import bars, sources
from moe_erc.data.config import DataConfig
from moe_erc.data.tokenizer import END_OF_DOCUMENT, library

VOCABULARY = Range(least=257, note="256 bytes and the end of a document")


def training_texts(config: DataConfig) -> Iterator[str]:
    """Every training document of the configured sources once, whatever the weights are."""
    for name in config.sources:
        source = sources.open_source(name, config)
        print(f"{name!r}: {source.account.splits}", file=sys.stderr)
        what = f"Reading {source.label}"
        for document in bars.over(source.documents(), what, source.count, "documents"):
            if document.split == "train":
                yield document.text.decode(errors="replace")


def train(texts: Iterable[str], vocab_size: int) -> Any:
    """A tokenizer of at most `vocab_size` ids; the same texts give the same merges."""
    in_range("--vocab_size", vocab_size, VOCABULARY)
    tokenizers = library()
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT[0]],
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def save(tokenizer: Any, output: Path) -> None:
    """Write a tokenizer.json in one step: a reader sees the old file or the whole new one."""
    temporary = output.with_name(f"{output.name}.incomplete-{secrets.token_hex(4)}")
    try:
        temporary.write_text(tokenizer.to_str(), encoding="utf-8")
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
