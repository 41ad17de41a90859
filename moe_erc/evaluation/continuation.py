"""The text behind a prompt, as its tokens come: where it ends, and how much of it no later token can change."""

INCOMPLETE = "\ufffd"  # what a decoder writes for a character of which bytes are missing


class Continuation:
    """Ends before a stop token, one of them the end of text, or before the first stop string to be complete."""

    def __init__(self, tokenizer, prompt, sampling):
        self.prompt_ids = list(tokenizer.encode(prompt)) or [
            tokenizer.eos_id
        ]  # after which a document starts
        self.text = ""
        self.ended = False
        self._ids = []
        self._decode = tokenizer.decode
        self._prompt_length = len(self._decode(self.prompt_ids))
        self._stop_ids = {tokenizer.eos_id, *sampling.stop_ids}
        self._stop_texts = sampling.stop_texts

    def extend(self, ids):
        """Appends tokens; those behind the end are dropped."""
        for token in ids:
            self.ended |= token in self._stop_ids
            if self.ended:
                break
            self._ids.append(token)
        # Decoded together with the prompt: some tokenizers write the first token of a text in
        # another way.
        text = self._decode(self.prompt_ids + self._ids)[self._prompt_length :]
        found = [(at + len(stop), at) for stop in self._stop_texts if (at := text.find(stop)) >= 0]
        self.ended |= bool(found)
        self.text = text[: min(found)[1]] if found else text

    @property
    def settled(self):
        """The text without what may still become another character, or a stop string."""
        if self.ended:
            return self.text
        text = self.text.removesuffix(INCOMPLETE)
        begun = (stop[:length] for stop in self._stop_texts for length in range(len(stop)))
        return text[
            : len(text) - max((len(start) for start in begun if text.endswith(start)), default=0)
        ]
