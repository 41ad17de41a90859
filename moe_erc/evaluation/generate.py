"""Text from a model: prompts run through it once and fill a key/value cache, then every token costs one position.

    slot     0  1  2  3 | 4  5  6  7  8
    row 0    .  .  t  h | e  .               prompts end together; a row that is done stays where it is
    row 1    m  a  i  n | (  )  :

Rows, prompts and slots are filled up to powers of two: few programs are compiled, and none for another `Sampling`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_erc import sharding
from moe_erc.checks import BadInput
from moe_erc.evaluation.continuation import Continuation
from moe_erc.evaluation.sampling import Sampling, draw
from moe_erc.measures.validation import SAMPLE
from moe_erc.model.context import cached, empty_cache

__all__ = ["Generator", "Sample", "Sampling"]
CHUNK = 32  # tokens between two looks at the text, which alone shows whether a row has reached a stop string


class Generator:
    """Continues prompts with the weights (`params` and `router`) given to each call; rows are split over the mesh."""

    def __init__(self, model, tokenizer, largest_context=32_768):
        self._model, self._tokenizer, self._largest_context = model, tokenizer, largest_context
        with_rows, everywhere = sharding.shard_cache(model.mesh), sharding.replicate(model.mesh)
        self._prefill = jax.jit(self._fill, static_argnames="length", out_shardings=with_rows)
        self._decode = jax.jit(self._extend, donate_argnames="cache", out_shardings=(with_rows, everywhere))

    def check(self, prompt, sampling):
        """BadInput for a prompt that `run` would refuse, before anything is compiled."""
        self._lay_out([Continuation(self._tokenizer, prompt, sampling)], sampling.new_tokens)

    def run(self, weights, prompts, sampling):
        """The continuations alone. Row b draws from its own key, whatever the other rows are and wherever it lies."""
        continuations = [Continuation(self._tokenizer, prompt, sampling) for prompt in prompts]
        for _ in self._write(weights, continuations, sampling, CHUNK):
            pass
        return [continuation.text for continuation in continuations]

    def stream(self, weights, prompt, sampling):
        """Yields the continuation, the same text, in pieces as they come."""
        continuation, shown = Continuation(self._tokenizer, prompt, sampling), 0
        for _ in self._write(weights, [continuation], sampling, 1):
            if piece := continuation.settled[shown:]:
                yield piece
                shown += len(piece)
        if shown < len(continuation.text):
            yield continuation.text[shown:]

    def _write(self, weights, continuations, sampling, chunk):
        """Extends the continuations by so many tokens at a time until all have ended, and yields in between."""
        rows, slot = self._lay_out(continuations, sampling.new_tokens)
        rule = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")}
        ids_V, stops = np.arange(self._tokenizer.vocab_size), [self._tokenizer.eos_id, *sampling.stop_ids]
        rule |= {"seed": np.uint32(sampling.seed), "stops_V": np.isin(ids_V, stops)}
        end = slot + sampling.new_tokens
        cache = self._prefill(weights, rows, length=_power_of_two(slot))
        while slot < end and not rows["done_B"].all():
            until = min(slot + chunk, end)
            cache, tokens_BS = self._decode(weights, cache, rows, (slot, until), rule)
            rows["tokens_BS"] = jax.device_get(tokens_BS)
            for row, continuation in enumerate(continuations):
                continuation.extend(rows["tokens_BS"][row, slot:until].tolist())
                rows["done_B"][row] = continuation.ended
            slot = until
            yield

    def _lay_out(self, continuations, new_tokens):
        """(rows, the slot behind the prompts); rows that no prompt needs are done."""
        prompts = [continuation.prompt_ids for continuation in continuations]
        slot, devices = max(map(len, prompts), default=1), self._model.mesh.size
        if slot + new_tokens > self._largest_context:
            raise BadInput(
                f"prompt: {slot} tokens and {new_tokens} new ones are more than the {self._largest_context} there is "
                "room for; shorten it, or lower new_tokens"
            )
        shape = devices * _power_of_two(-(-len(prompts) // devices), 1), _power_of_two(slot + new_tokens)
        tokens_BS, first_B = np.zeros(shape, np.int32), np.full(shape[0], slot - 1, np.int32)
        for row, prompt in enumerate(prompts):
            first_B[row] = slot - len(prompt)
            tokens_BS[row, first_B[row] : slot] = prompt
        return {"tokens_BS": tokens_BS, "first_B": first_B, "done_B": np.arange(shape[0]) >= len(prompts)}, slot

    def _apply(self, weights, tokens_BT, context):
        every_BT = jnp.ones_like(tokens_BT, bool)
        return self._model.apply({"params": weights.params}, tokens_BT, every_BT, weights.router, context)

    def _fill(self, weights, rows, length):
        """A cache that knows the first `length` slots; what is written there behind the prompts is written again."""
        cache = empty_cache(self._model.config, *rows["tokens_BS"].shape)
        context = cached(cache, rows["first_B"], 0, length)
        return self._apply(weights, rows["tokens_BS"][:, :length], context).cache

    def _extend(self, weights, cache, rows, span, rule):
        """(cache, tokens_BS) with the slots of `span` written, or fewer when all rows are done."""
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(rule["seed"]), jnp.arange(len(rows["done_B"])))

        def unfinished(state):
            slot, _, _, done_B = state
            return (slot < span[1]) & ~jnp.all(done_B)

        def one(state):
            slot, cache, tokens_BS, done_B = state
            last_B1 = lax.dynamic_slice_in_dim(tokens_BS, slot - 1, 1, axis=1)
            output = self._apply(weights, last_B1, cached(cache, rows["first_B"], slot - 1, 1))
            logits_BV = output.x_BTD[:, 0].astype(jnp.float32) @ output.head_VD.T
            known_BV = logits_BV[:, : self._tokenizer.vocab_size]  # the head may be padded beyond the tokenizer
            now_B = jax.vmap(jax.random.fold_in)(keys_B, slot - rows["first_B"])
            drawn_B = draw(known_BV, now_B, rule["temperature"], rule["top_k"], rule["top_p"]).astype(jnp.int32)
            tokens_BS = lax.dynamic_update_slice_in_dim(tokens_BS, drawn_B[:, None], slot, axis=1)
            return slot + 1, output.cache, tokens_BS, done_B | rule["stops_V"][drawn_B]

        state = span[0], cache, rows["tokens_BS"], rows["done_B"]
        return lax.while_loop(unfinished, one, state)[1:3]


class Sample:
    """How the model of `run(weights)` continues a prompt; nothing of an empty one."""

    def __init__(self, generator: Generator, prompt: str, sampling: Sampling):
        generator.check(prompt, sampling)
        self._generator, self._prompt, self._sampling = generator, prompt, sampling

    def run(self, weights) -> dict[str, str]:
        """The prompt with its continuation."""
        if not self._prompt:
            return {}
        [continuation] = self._generator.run(weights, [self._prompt], self._sampling)
        return {SAMPLE.of(self._prompt).key: self._prompt + continuation}


def _power_of_two(size, least=16):
    return max(1 << (size - 1).bit_length(), least)
