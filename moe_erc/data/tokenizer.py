"""Text to token ids and back: plain bytes, or a Hugging Face `tokenizer.json`.

Both follow the protocol `Tokenizer`. A model may have more rows than a tokenizer has ids; `decode`
therefore ignores ids that it does not know. `bpe.py` makes a tokenizer.json from the configured
text.
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


# How published tokenizers spell other control tokens. Text must not make them, also if a file does
# not call them special.
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
    "<mask>",
    "[MASK]",
    "<eod>",
    "<eot>",
    "<eop>",
)
_CONTROL_FORM = re.compile(r"<[|｜][^<>]+[|｜]>")  # <|im_start|>
# Files beside a tokenizer.json that name the end of a document, and their keys.
_SETTINGS = (
    ("tokenizer_config.json", "eos_token"),
    ("special_tokens_map.json", "eos_token"),
    ("generation_config.json", "eos_token_id"),
    ("config.json", "eos_token_id"),
)


class Tokenizer(Protocol):
    """The interface of a tokenizer for the rest of the package."""

    vocab_size: int
    eos_id: int  # of the token after every document
    eos: str  # its spelling
    identity: str  # differs if any text could have other ids

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """Token ids of every text, without end-of-document tokens."""

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids of one text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of any ids, also of ids that no text encodes to."""


class ByteTokenizer:
    """UTF-8 bytes as tokens, and one more token that ends a document.

    It needs no training and can encode every character.
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
        # A document that mentions "<|endoftext|>" does not end there.
        self._tokenizer.encode_special_tokens = True
        # The file may ask for truncation and padding.
        self._tokenizer.no_truncation()
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
        # If nothing else than the file decides the ids, its digest is the identity.
        if marked or declared:
            what_decides = json.dumps([self.identity, self.eos, marked])
            self.identity = hashlib.sha256(what_decides.encode()).hexdigest()
        self._is_control = self._control_ids()
        self._unknown_id = _unknown_id(self._tokenizer)

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        strings = []
        for text in texts:
            # A text from the command line that is not UTF-8 has surrogates, which the library
            # refuses.
            data = text if isinstance(text, bytes) else text.encode(errors="replace")
            strings.append(data.decode(errors="replace"))
        found = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        ids_of_texts = []
        for text, encoding in zip(strings, found, strict=True):
            ids_N = np.array(encoding.ids, np.uint32)
            if self._is_control[ids_N].any():
                ids_N = np.array(list(self._spelled(text)), np.uint32)
            ids_of_texts.append(ids_N)
        return ids_of_texts

    def encode(self, text: str | bytes) -> np.ndarray:
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids if 0 <= token < self.vocab_size])

    def _mark_special(self) -> list[str]:
        """Mark control tokens as special that the file does not; returns their spellings."""
        marked = []
        for _, token in sorted(self._tokenizer.get_added_tokens_decoder().items()):
            is_control = token.content in (*END_OF_DOCUMENT, *_CONTROL, self.eos)
            is_control = is_control or _CONTROL_FORM.fullmatch(token.content)
            if is_control and not token.special:
                token.special = True
                self._tokenizer.add_special_tokens([token])
                marked.append(token.content)
        return marked

    def _control_ids(self) -> np.ndarray:
        """(V,) bool: whether an id is a control token, which no text may make."""
        added = self._tokenizer.get_added_tokens_decoder()
        is_control = np.zeros(self.vocab_size, bool)
        is_control[self.eos_id] = True
        for number, token in added.items():
            if token.special:
                is_control[number] = True
        return is_control

    def _spelled(self, text: str) -> Iterator[int]:
        """The ids of a text that spells a control token, without that token.

        The model of such a tokenizer has control tokens as words of its vocabulary. The text is cut
        within the control token, and the parts before and behind the cut are encoded apart.
        """
        waiting = [text]
        while waiting:
            piece = waiting.pop()
            found = self._tokenizer.encode(piece, add_special_tokens=False)
            cut = self._first_cut(piece, found)
            if cut is None:
                yield from found.ids
            # A single character that is a control token has no other spelling and is left out.
            elif len(piece) > 1:
                waiting += [piece[cut:], piece[:cut]]

    def _first_cut(self, piece: str, found) -> int | None:
        """A place within the first control token that a text spells; None if it spells none."""
        for token, (start, end) in zip(found.ids, found.offsets, strict=True):
            spelled = piece[start:end].strip() == self._tokenizer.id_to_token(token)
            # Text that is not in the vocabulary rightly becomes the unknown token. Text that spells
            # the unknown token must not.
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
    """The library `tokenizers`, which only a tokenizer.json needs."""
    try:
        import tokenizers
    except ImportError:
        raise BadInput(
            "data.tokenizer: the library 'tokenizers' is missing; "
            "pip install 'moe_erc[tokenizers]', or use 'bytes'"
        ) from None
    return tokenizers


def _declared_ends(directory: Path, vocabulary: dict[str, int]) -> Iterator[str]:
    """Tokens of the vocabulary that files beside a tokenizer.json name as the end of a text."""
    spellings = {number: token for token, number in vocabulary.items()}
    for name, key in _SETTINGS:
        try:
            value = json.loads((directory / name).read_bytes()).get(key)
        except (OSError, ValueError, AttributeError, RecursionError):
            continue  # the file is absent or has another content
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
    # For a Unigram model the library tells it only in the file.
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
