"""The tokenizer of a checkpoint: tokenizer.json, and what transformers wants to know of it."""

import json

from moe_erc.checks import BadInput
from moe_erc.data import paths

BYTES = "bytes"
END_OF_DOCUMENT = "<|endoftext|>"


def _byte_level():
    """Plain bytes as a tokenizer.json: the id of a byte is the byte, and 256 ends a document.

    A byte-pair encoding without merges. The library spells bytes as characters that can be seen:
    those of Latin-1 that can be stand for themselves, the others for the characters from 256 on.
    """
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    unseen = iter(range(256, 512))
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
            "vocab": {chr(byte if byte in seen else next(unseen)): byte for byte in range(256)},
            "merges": [],
        },
    }


BYTE_LEVEL = json.dumps(_byte_level(), indent=1)


def tokenizer_files(spec, end_of_document, length):
    """{name: content} of what `data.tokenizer` names, whose documents end with that token, for so many tokens."""
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_of_document,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    content = BYTE_LEVEL if spec == BYTES else paths.local(spec).read_text(encoding="utf-8")
    return {"tokenizer.json": content, "tokenizer_config.json": json.dumps(options, indent=1)}


def tokenizer_of(directory, spec):
    """`data.tokenizer` of a run that starts from a checkpoint: its tokenizer.json where `spec` was left at "bytes".

    One that is plain bytes, as `tokenizer_files` writes it, is "bytes" again. FileNotFoundError if
    there is none. `spec` as it is for a run that starts from nothing, "".
    """
    if not directory or spec != BYTES:
        return spec
    path = paths.local(directory) / "tokenizer.json"
    if not path.is_file():
        raise BadInput(
            f"no tokenizer.json in {path.parent}; name the model's with --config.data.tokenizer"
        )
    return BYTES if path.read_bytes() == BYTE_LEVEL.encode() else str(path)
