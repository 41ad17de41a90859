"""A model for the lm-evaluation-harness (EleutherAI, `lm_eval`): strings in, scores or text out.

The harness knows of one process only. Every process of a run therefore asks the same requests and
gets the same answers.
"""

import collections
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from moe_erc.checks import BadInput
from moe_erc.data.tokenizer import Tokenizer
from moe_erc.evaluation import generate
from moe_erc.evaluation.scoring import Scorer, grow
from moe_erc.model.transformer import Transformer

# Set before the import: the harness would fork this process, which has the threads of JAX.
os.environ.setdefault("DISABLE_MULTIPROC", "1")
try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import evaluate
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise BadInput(
        'tasks need the lm-evaluation-harness, which is missing: pip install -e ".[eval]"'
    ) from None

__all__ = ("LanguageModel", "Rehearsal", "TaskManager", "evaluate")
NEW_TOKENS = 256  # at most, for tasks that set no limit


class LanguageModel(TemplateLM):
    """A model of a run or of a checkpoint; a row has at most as many tokens as `shape_BT` says.

    `weights` may be replaced by others of the same shapes without a new compilation.
    """

    def __init__(
        self, model: Transformer, weights: Any, tokenizer: Tokenizer, shape_BT: tuple[int, int]
    ):
        super().__init__()
        self.weights = weights
        self._model = model
        self._tokenizer = tokenizer
        self._rows = shape_BT[0]
        self._scorer = Scorer(model, shape_BT)

    @functools.cached_property
    def _generator(self):
        return generate.Generator(self._model, self._tokenizer)

    @property
    def max_length(self) -> int:
        return self._scorer.limit

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self._tokenizer.encode(string).tolist()

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests, **_):
        return self._scorer.run(self.weights, _without_text(requests))

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[float]:
        """Every token is scored once, in windows of the whole length.

        The first window begins with the end of text.
        """
        windows = []
        owners = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, context_len=1
            )
            for window in rolling:
                windows.append(make_disjoint_window(window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        answers = self._scorer.run(self.weights, windows)
        for owner, (score, _) in zip(owners, answers, strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Continue prompts; those of the same settings run together, longest first.

        A batch draws with a seed of its own.
        """
        by_settings = collections.defaultdict(list)
        found = [None] * len(requests)
        for place, request in enumerate(requests):
            by_settings[repr(request.args[1])].append(place)
        for places in by_settings.values():
            options = self._sampling(requests[places[0]].args[1])
            prompts = {}
            for place in places:
                prompts[place] = self._cut(requests[place].args[0], options["new_tokens"])
            # Prompts of a batch are padded to the longest, so similar lengths belong together.
            places.sort(key=lambda place: len(prompts[place]), reverse=True)
            for start in range(0, len(places), self._rows):
                batch = places[start : start + self._rows]
                sampling = generate.Sampling(**options, seed=start)
                batch_prompts = [prompts[place] for place in batch]
                texts = self._generator.run(self.weights, batch_prompts, sampling)
                for place, text in zip(batch, texts, strict=True):
                    found[place] = text
        return found

    def _sampling(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The harness's settings as fields of `Sampling`."""
        kwargs = normalize_gen_kwargs(settings, min(NEW_TOKENS, self.max_length // 2))
        return {
            "new_tokens": kwargs["max_gen_toks"],
            "temperature": kwargs.get("temperature", 0.0),
            "top_k": kwargs.get("top_k", 0),
            "top_p": kwargs.get("top_p", 1.0),
            "stop": tuple(kwargs["until"]),
        }

    def _cut(self, prompt, new_tokens):
        """The prompt, or its end if it is too long together with the new tokens."""
        room = self.max_length - new_tokens
        tokens = self._tokenizer.encode(prompt)
        if room < 1:
            raise BadInput(
                f"{new_tokens} new tokens leave no room for a prompt in {self.max_length}"
            )
        return prompt if len(tokens) <= room else self._tokenizer.decode(tokens[-room:])


class Rehearsal(LanguageModel):
    """Takes the requests of a model and computes nothing.

    BadInput for a request that the rows of the model cannot hold.
    """

    def _loglikelihood_tokens(self, requests, **_):
        grow(_without_text(requests), self.max_length)
        return []

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[float]:
        return []  # its windows are made to fit

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        for request in requests:
            prompt, settings = request.args
            self._cut(prompt, self._sampling(settings)["new_tokens"])
        return []


def _without_text(requests):
    """(context, continuation) of requests (text, context, continuation)."""
    return [(context, continuation) for _, context, continuation in requests]
