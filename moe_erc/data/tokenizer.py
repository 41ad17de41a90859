"""Text to token ids and back: plain bytes, or a Hugging Face `tokenizer.json`.

Both have `vocab_size`, `eos_id` and `eos` (the token after every document, and how it is spelled), `identity` (differs
whenever ids could differ), `encode_batch`, `encode` and `decode`. Models may have more rows than a tokenizer has ids,
so `decode` ignores ids that it does not know. `bpe.py` makes such a file from the configured text.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from moe_erc.checks import BadInput

# How published tokenizers spell the end of a document.
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")


class Tokenizer(Protocol):
    """What the rest of the package knows of a tokenizer."""

    vocab_size: int
    eos_id: int
    eos: str
    identity: str

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """Token ids of every text, without end-of-document tokens."""

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids of one text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of any ids, also of ids that no text encodes to."""


class ByteTokenizer:
    """UTF-8 bytes as tokens, and one more that ends a document: no training, no unknown characters."""

    vocab_size = 257
    eos_id = 256
    eos = END_OF_DOCUMENT[0]
    identity = "bytes"

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode(self, text: str | bytes) -> np.ndarray:
        data = text.encode(errors="replace") if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(token) for token in ids if 0 <= token <= 255).decode(errors="replace")


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the `tokenizers` library; text that spells a special token stays text."""

    def __init__(self, path: Path):
        self.identity = hashlib.sha256(path.read_bytes()).hexdigest()
        self._tokenizer = _read(path)
        self._tokenizer.encode_special_tokens = True  # a document about "<|endoftext|>" does not end there
        self._tokenizer.no_truncation()  # which the file may ask for, as it may for padding
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=0) + 1
        ends = [token for token in END_OF_DOCUMENT if token in vocabulary]
        if not ends:
            raise BadInput(
                f"data.tokenizer: '{path}' has no end-of-document token; add one of {', '.join(END_OF_DOCUMENT)}"
            )
        self.eos = ends[0]
        self.eos_id = vocabulary[self.eos]

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        # A text from the command line that is no UTF-8 has surrogates, which the library does not take.
        encoded = [text if isinstance(text, bytes) else text.encode(errors="replace") for text in texts]
        strings = [text.decode(errors="replace") for text in encoded]
        return [
            np.array(found.ids, np.uint32)
            for found in self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        ]

    def encode(self, text: str | bytes) -> np.ndarray:
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids if 0 <= token < self.vocab_size])


def load(spec: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: "bytes" or the path of a tokenizer.json."""
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if not path.is_file():
        raise BadInput(f"data.tokenizer: no such file '{spec}'; give 'bytes' or the path of a tokenizer.json")
    return HuggingFaceTokenizer(path)


def library():
    """The `tokenizers` library, which only these tokenizers need."""
    try:
        import tokenizers
    except ImportError:
        raise BadInput(
            "data.tokenizer: the library 'tokenizers' is missing; pip install 'moe_erc[tokenizers]', or use 'bytes'"
        ) from None
    return tokenizers


def _read(path: Path):
    tokenizers = library()
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        reason = str(error).splitlines()[0]
        raise BadInput(
            f"data.tokenizer: '{path}' is not a tokenizer.json ({reason}); give 'bytes' or a file that is"
        ) from None
