"""The text behind a prompt, token by token.

It knows where the text ends, and which part of it no later token can change.
"""

from collections.abc import Iterable

from moe_erc.data.tokenizer import Tokenizer
from moe_erc.evaluation.sampling import Sampling

INCOMPLETE = "\ufffd"  # what a decoder writes for a character of which bytes are missing


class Continuation:
    """The text that continues one prompt.

    It ends before a stop token, or before the first stop string that is complete. The end of text
    is always a stop token.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str, sampling: Sampling):
        # An empty prompt is the end of a text, after which a document starts.
        self.prompt_ids = list(tokenizer.encode(prompt)) or [tokenizer.eos_id]
        self.text = ""
        self.ended = False
        self._ids = []
        self._decode = tokenizer.decode
        self._prompt_length = len(self._decode(self.prompt_ids))
        self._stop_ids = {tokenizer.eos_id, *sampling.stop_ids}
        self._stop_texts = sampling.stop_texts

    def extend(self, ids: Iterable[int]) -> None:
        """Append tokens; those behind the end are dropped."""
        for token in ids:
            self.ended |= token in self._stop_ids
            if self.ended:
                break
            self._ids.append(token)
        # The prompt is decoded too, because some tokenizers write the first token of a text in
        # another way.
        text = self._decode(self.prompt_ids + self._ids)[self._prompt_length :]
        found = []  # (end, start) of stop strings: the one that ends first was complete first
        for stop in self._stop_texts:
            start = text.find(stop)
            if start >= 0:
                found.append((start + len(stop), start))
        self.ended |= bool(found)
        self.text = text[: min(found)[1]] if found else text

    @property
    def settled(self) -> str:
        """The text without an end that may still become another character or a stop string."""
        if self.ended:
            return self.text
        text = self.text.removesuffix(INCOMPLETE)
        open_end = 0  # characters at the end that a stop string may begin with
        for stop in self._stop_texts:
            for length in range(len(stop)):
                if text.endswith(stop[:length]):
                    open_end = max(open_end, length)
        return text[: len(text) - open_end]
