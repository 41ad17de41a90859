"""A model as the lm-evaluation-harness knows one (EleutherAI, `lm_eval`): strings in, scores or text out.

Every process of a run asks the same and is told the same; the harness itself knows of one process
only.
"""

import collections
import functools
import os

from moe_erc.checks import BadInput
from moe_erc.evaluation import generate
from moe_erc.evaluation.scoring import Scorer, grow

os.environ.setdefault(
    "DISABLE_MULTIPROC", "1"
)  # the harness would fork a process that has the threads of JAX
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
NEW_TOKENS = 256  # at most, where a task does not say


class LanguageModel(TemplateLM):
    """Of a run or of a checkpoint; rows have at most the time steps of `shape_BT`, as in training.

    `weights` may be exchanged for others of the same shapes: nothing is compiled again.
    """

    def __init__(self, model, weights, tokenizer, shape_BT):
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
    def max_length(self):
        return self._scorer.limit

    @property
    def eot_token_id(self):
        return self._tokenizer.eos_id

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self._tokenizer.encode(string).tolist()

    def loglikelihood(self, requests, disable_tqdm=True):
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests, **_):
        return self._scorer.run(
            self.weights, [(context, continuation) for _, context, continuation in requests]
        )

    def loglikelihood_rolling(self, requests, disable_tqdm=True):
        """Every token once, in windows of the whole length, of which the first begins after an end of text."""
        windows = []
        owners = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append(make_disjoint_window(window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._scorer.run(self.weights, windows), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests, disable_tqdm=True):
        """Prompts of the same settings together, longest first.

        A batch draws by a seed of its own.
        """
        by_settings = collections.defaultdict(list)
        found = [None] * len(requests)
        for place, request in enumerate(requests):
            by_settings[repr(request.args[1])].append(place)
        for places in by_settings.values():
            options = self._sampling(requests[places[0]].args[1])
            prompts = {
                place: self._cut(requests[place].args[0], options["new_tokens"]) for place in places
            }
            places.sort(key=lambda place: len(prompts[place]), reverse=True)
            for start in range(0, len(places), self._rows):
                batch = places[start : start + self._rows]
                sampling = generate.Sampling(**options, seed=start)
                texts = self._generator.run(
                    self.weights, [prompts[place] for place in batch], sampling
                )
                for place, text in zip(batch, texts, strict=True):
                    found[place] = text
        return found

    def _sampling(self, settings):
        """The harness's words for it in ours."""
        kwargs = normalize_gen_kwargs(settings, min(NEW_TOKENS, self.max_length // 2))
        return {
            "new_tokens": kwargs["max_gen_toks"],
            "temperature": kwargs.get("temperature", 0.0),
            "top_k": kwargs.get("top_k", 0),
            "top_p": kwargs.get("top_p", 1.0),
            "stop": tuple(kwargs["until"]),
        }

    def _cut(self, prompt, new_tokens):
        """The end of a prompt that is too long beside the tokens to come."""
        room = self.max_length - new_tokens
        tokens = self._tokenizer.encode(prompt)
        if room < 1:
            raise BadInput(
                f"{new_tokens} new tokens leave no room for a prompt in {self.max_length}"
            )
        return prompt if len(tokens) <= room else self._tokenizer.decode(tokens[-room:])


class Rehearsal(LanguageModel):
    """Is asked like the model and computes nothing: ValueError for a request that its rows cannot hold."""

    def _loglikelihood_tokens(self, requests, **_):
        grow([(context, continuation) for _, context, continuation in requests], self.max_length)
        return []

    def loglikelihood_rolling(self, requests, disable_tqdm=True):
        return []  # its windows are made to fit

    def generate_until(self, requests, disable_tqdm=True):
        for request in requests:
            prompt, settings = request.args
            self._cut(prompt, self._sampling(settings)["new_tokens"])
        return []
