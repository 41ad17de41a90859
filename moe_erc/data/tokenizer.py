"""Text to token ids and back: plain bytes, or a Hugging Face `tokenizer.json`.

Both have `vocab_size`, `eos_id` and `eos` (the token after every document, and how it is spelled),
`identity` (differs whenever ids could differ), `encode_batch`, `encode` and `decode`. Models may
have more rows than a tokenizer has ids, so `decode` ignores ids that it does not know. `bpe.py`
makes such a file from the configured text.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

from moe_erc.checks import BadInput
from moe_erc.data import paths

# How published tokenizers spell the end of a document.
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")


# How published tokenizers spell other tokens that text must not make, where a file forgets to call
# them special.
_CONTROL = (
    "<s>",
    "<bos>",
    "<|bos|>",
    "[BOS]",
    "[CLS]",
    "<cls>",
    "<sep>",
    "<pad>",
    "[PAD]",
    "<unk>",
    "[UNK]",
)
_CONTROL += ("<mask>", "[MASK]", "<eod>", "<eot>", "<eop>")
_CONTROL_FORM = re.compile(r"<[|｜][^<>]+[|｜]>")  # <|im_start|>
# Files beside a tokenizer.json that say how a document ends, and under which keys.
_SETTINGS = (
    ("tokenizer_config.json", "eos_token"),
    ("special_tokens_map.json", "eos_token"),
    ("generation_config.json", "eos_token_id"),
    ("config.json", "eos_token_id"),
)


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
    """UTF-8 bytes as tokens, and one more that ends a document.

    It needs no training and knows every character.
    """

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
    """A `tokenizer.json` of the `tokenizers` library; text that spells a control token stays text.

    Control tokens are those that the file calls special, the end of a document, and added tokens
    that are spelled like one (`_CONTROL`, `<|…|>`) and that the file calls ordinary. Other ordinary
    added tokens, such as runs of spaces, are text and encode as in transformers.
    """

    def __init__(self, path: Path):
        self.identity = hashlib.sha256(path.read_bytes()).hexdigest()
        self._tokenizer = _read(path)
        # a document about "<|endoftext|>" does not end there
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()  # which the file may ask for, as it may for padding
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=0) + 1
        ends = [token for token in END_OF_DOCUMENT if token in vocabulary]
        declared = [] if ends else list(_declared_ends(path.parent, vocabulary))
        if not ends and not declared:
            raise BadInput(
                f"data.tokenizer: '{path}' has no end-of-document token; "
                f"add one of {', '.join(END_OF_DOCUMENT)}, "
                "or name it as eos_token in a tokenizer_config.json beside it"
            )
        self.eos = (ends or declared)[0]
        self.eos_id = vocabulary[self.eos]
        marked = self._mark_special()
        if marked or declared:  # else the file alone decides the ids, as it always did
            self.identity = hashlib.sha256(
                json.dumps([self.identity, self.eos, marked]).encode()
            ).hexdigest()
        self._is_control = self._control_ids()
        self._unknown_id = _unknown_id(self._tokenizer)

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        # A text from the command line that is no UTF-8 has surrogates, which the library does not
        # take.
        encoded = [
            text if isinstance(text, bytes) else text.encode(errors="replace") for text in texts
        ]
        strings = [text.decode(errors="replace") for text in encoded]
        found = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        ids = [np.array(encoding.ids, np.uint32) for encoding in found]
        return [
            np.array(list(self._spelled(text)), np.uint32)
            if self._is_control[ids_N].any()
            else ids_N
            for text, ids_N in zip(strings, ids, strict=True)
        ]

    def encode(self, text: str | bytes) -> np.ndarray:
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids if 0 <= token < self.vocab_size])

    def _mark_special(self) -> list[str]:
        """Call special what is a control token in all but name; returns what was not called so."""
        marked = []
        for _, token in sorted(self._tokenizer.get_added_tokens_decoder().items()):
            known = token.content in (*END_OF_DOCUMENT, *_CONTROL, self.eos)
            if not token.special and (known or _CONTROL_FORM.fullmatch(token.content)):
                token.special = True
                self._tokenizer.add_special_tokens([token])
                marked.append(token.content)
        return marked

    def _control_ids(self) -> np.ndarray:
        """By id, whether no text may make it."""
        added = self._tokenizer.get_added_tokens_decoder()
        is_control = np.zeros(self.vocab_size, bool)
        is_control[[number for number, token in added.items() if token.special] + [self.eos_id]] = (
            True
        )
        return is_control

    def _spelled(self, text: str) -> Iterator[int]:
        """Ids of a text of which the model itself makes a control token.

        Its vocabulary holds such tokens as words.

        Such a token is cut in two in the text, and what lies before and behind the cut is encoded
        by itself.
        """
        waiting = [text]
        while waiting:
            piece = waiting.pop()
            found = self._tokenizer.encode(piece, add_special_tokens=False)
            cut = self._first_cut(piece, found)
            if cut is None:
                yield from found.ids
            # else a single character that is a control token: it has no other spelling
            elif len(piece) > 1:
                waiting += [piece[cut:], piece[:cut]]

    def _first_cut(self, piece: str, found) -> int | None:
        """Where to cut a piece of text within the first control token that it spells.

        None if it spells none.
        """
        for token, (start, end) in zip(found.ids, found.offsets, strict=True):
            spelled = piece[start:end].strip() == self._tokenizer.id_to_token(token)
            # What is not in the vocabulary is the unknown token, rightly, unless the text spells
            # just that.
            if self._is_control[token] and (token != self._unknown_id or spelled):
                return min(max((start + end) // 2, 1), len(piece) - 1)
        return None


def load(spec: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: "bytes" or the path of a tokenizer.json."""
    if spec == "bytes":
        return ByteTokenizer()
    path = paths.local(spec)
    if not path.is_file():
        raise BadInput(
            f"data.tokenizer: no such file '{spec}'; give 'bytes' or the path of a tokenizer.json"
        )
    return HuggingFaceTokenizer(path)


def library() -> ModuleType:
    """The `tokenizers` library, which only these tokenizers need."""
    try:
        import tokenizers
    except ImportError:
        raise BadInput(
            "data.tokenizer: the library 'tokenizers' is missing; "
            "pip install 'moe_erc[tokenizers]', or use 'bytes'"
        ) from None
    return tokenizers


def _declared_ends(directory: Path, vocabulary: dict[str, int]) -> Iterator[str]:
    """Tokens of the vocabulary that the files beside a tokenizer.json call the end of a text."""
    spellings = {number: token for token, number in vocabulary.items()}
    for name, key in _SETTINGS:
        try:
            value = json.loads((directory / name).read_bytes()).get(key)
        except (OSError, ValueError, AttributeError, RecursionError):
            continue  # absent, or of something else
        first = value[0] if isinstance(value, list) and value else value
        token = first.get("content") if isinstance(first, dict) else first
        token = spellings.get(token) if isinstance(token, int) else token
        if isinstance(token, str) and token in vocabulary:
            yield token


def _unknown_id(tokenizer) -> int | None:
    """The id of what is not in the vocabulary, or None if there is none."""
    token = getattr(tokenizer.model, "unk_token", None)
    if token is not None:
        return tokenizer.token_to_id(token)
    # The library tells that of a Unigram model in the file alone.
    is_unigram = type(tokenizer.model).__name__ == "Unigram"
    return json.loads(tokenizer.to_str())["model"].get("unk_id") if is_unigram else None


def _read(path: Path):
    tokenizers = library()
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        reason = str(error).splitlines()[0]
        raise BadInput(
            f"data.tokenizer: '{path}' is not a tokenizer.json ({reason}); "
            "give 'bytes' or a file that is"
        ) from None
