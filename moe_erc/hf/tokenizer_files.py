"""The tokenizer of a checkpoint: tokenizer.json, and the settings that transformers reads."""

import json
import os
from collections.abc import Sequence

from moe_erc.checks import BadInput
from moe_erc.data import paths

BYTES = "bytes"
END_OF_DOCUMENT = "<|endoftext|>"
NEVER = 257  # the id of two bytes 255 in a tokenizer of bytes
PADDING = ("<|padding|>", "<|pad|>", "<pad>", "[PAD]")  # how published tokenizers spell it


def _byte_level():
    """Plain bytes as a tokenizer.json: the id of a byte is the byte, and 256 ends a document.

    It is a byte-pair encoding whose one merge, of two bytes 255, no UTF-8 text ever takes:
    llama.cpp reads none without merges. The library spells every byte as a visible character. A
    visible character of Latin-1 stands for itself; the other bytes have the characters from 256 on.
    """
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    unseen = iter(range(256, 512))
    vocabulary = {}
    for byte in range(256):
        vocabulary[chr(byte if byte in seen else next(unseen))] = byte
    vocabulary[END_OF_DOCUMENT] = 256
    never = chr(255)
    vocabulary[never + never] = NEVER
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256, "content": END_OF_DOCUMENT, **flags}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [[never, never]],
        },
    }


BYTE_LEVEL = json.dumps(_byte_level(), indent=1)


def tokenizer_files(spec: str, end_of_document: str, length: int) -> dict[str, str]:
    """The files of a tokenizer, {name: content}.

    Args:
      spec: `data.tokenizer`, "bytes" or the path of a tokenizer.json
      end_of_document: the token at the end of every document
      length: the context length of the model in tokens
    """
    content = BYTE_LEVEL if spec == BYTES else paths.local(spec).read_text(encoding="utf-8")
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_of_document,
        "pad_token": _padding(content) or end_of_document,
        # Prompts of a batch must end side by side, because generation goes on behind them.
        "padding_side": "left",
        "model_max_length": length,
        # Without this, transformers 4 gives token_type_ids, which `generate` refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": content, "tokenizer_config.json": json.dumps(options, indent=1)}


def rows_of(spec: str, tokens: int, vocabulary: int) -> Sequence[int]:
    """For every id of `tokenizer_files` the row of embedding and head that it has.

    Rows of a padded vocabulary are left out, because an engine could emit their ids. A model of
    bytes may have no row for NEVER, which then has that of byte 255: no text has either.

    Args:
      spec: as above
      tokens: how many ids the tokenizer of the run has
      vocabulary: how many rows the model has
    """
    if spec != BYTES:
        return range(tokens)
    return range(NEVER + 1) if vocabulary > NEVER else (*range(NEVER), 255)


def _padding(content):
    """The padding token of a tokenizer.json, or None."""
    added = json.loads(content).get("added_tokens") or ()
    spelled = [token["content"] for token in added]
    return next((token for token in PADDING if token in spelled), None)


def tokenizer_of(directory: os.PathLike | str, spec: str) -> str:
    """`data.tokenizer` of a run that starts from a checkpoint, or from nothing ("").

    It is `spec`, but if `spec` was left at "bytes", the tokenizer.json of the checkpoint takes its
    place. A tokenizer.json of plain bytes, as `tokenizer_files` writes it, is "bytes" again.

    Raises:
      BadInput: if the checkpoint has no tokenizer.json.
    """
    if not directory or spec != BYTES:
        return spec
    path = paths.local(directory) / "tokenizer.json"
    if not path.is_file():
        raise BadInput(
            f"no tokenizer.json in {path.parent}; name the model's with --config.data.tokenizer"
        )
    return BYTES if path.read_bytes() == BYTE_LEVEL.encode() else str(path)
