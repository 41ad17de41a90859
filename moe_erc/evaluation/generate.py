"""Text from a model.

The prompts run through the model once and fill a key/value cache. Every further token then runs one
position.

    slot     0  1  2  3 | 4  5  6  7  8
    row 0    .  .  t  h | e  .
    row 1    m  a  i  n | (  )  :

All prompts end in the same slot. A row that is done is not extended. Rows, prompts and slots are
padded to powers of two, so that few programs are compiled. Another `Sampling` needs no new program.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_erc import sharding
from moe_erc.checks import BadInput
from moe_erc.data.tokenizer import Tokenizer
from moe_erc.evaluation.continuation import Continuation
from moe_erc.evaluation.sampling import Sampling, draw
from moe_erc.measures.validation import SAMPLE
from moe_erc.model.context import cached, empty_cache
from moe_erc.model.transformer import Transformer

__all__ = ["Generator", "Sample", "Sampling"]
# Tokens between two checks of the text. Only the text shows whether a row has met a stop string.
CHUNK = 32


class Generator:
    """Continues prompts with the weights (`params` and `router`) given to each call.

    Rows are split over the mesh.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, largest_context: int = 32_768):
        self._model = model
        self._tokenizer = tokenizer
        self._largest_context = largest_context
        with_rows = sharding.shard_cache(model.mesh)
        everywhere = sharding.replicate(model.mesh)
        self._prefill = jax.jit(self._fill, static_argnames="length", out_shardings=with_rows)
        self._decode = jax.jit(
            self._extend, donate_argnames="cache", out_shardings=(with_rows, everywhere)
        )

    def check(self, prompt: str, sampling: Sampling) -> None:
        """BadInput for a prompt that `run` would refuse, before anything is compiled."""
        self._lay_out([Continuation(self._tokenizer, prompt, sampling)], sampling.new_tokens)

    def run(self, weights: Any, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """The continuations, without their prompts.

        Row b draws from its own key. It does not depend on other rows or on the device.
        """
        continuations = [Continuation(self._tokenizer, prompt, sampling) for prompt in prompts]
        for _ in self._write(weights, continuations, sampling, CHUNK):
            pass
        return [continuation.text for continuation in continuations]

    def stream(self, weights: Any, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Yield the same continuation in pieces, each as soon as it is settled."""
        continuation = Continuation(self._tokenizer, prompt, sampling)
        shown = 0
        for _ in self._write(weights, [continuation], sampling, 1):
            piece = continuation.settled[shown:]
            if piece:
                yield piece
                shown += len(piece)
        if shown < len(continuation.text):
            yield continuation.text[shown:]

    def _write(self, weights, continuations, sampling, chunk):
        """Extend the continuations until all have ended; yields after every `chunk` tokens."""
        rows, slot = self._lay_out(continuations, sampling.new_tokens)
        rule = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")}
        ids_V = np.arange(self._tokenizer.vocab_size)
        stops = [self._tokenizer.eos_id, *sampling.stop_ids]
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
        """(rows, the slot behind the prompts); a row without a prompt is done from the start."""
        prompts = [continuation.prompt_ids for continuation in continuations]
        slot = max(map(len, prompts), default=1)
        devices = self._model.mesh.size
        if slot + new_tokens > self._largest_context:
            raise BadInput(
                f"prompt: {slot} tokens and {new_tokens} new ones are more than the "
                f"{self._largest_context} there is room for; shorten it, or lower new_tokens"
            )
        rows_per_device = _power_of_two(-(-len(prompts) // devices), 1)
        rows = devices * rows_per_device
        tokens_BS = np.zeros((rows, _power_of_two(slot + new_tokens)), np.int32)
        first_B = np.full(rows, slot - 1, np.int32)
        for row, prompt in enumerate(prompts):
            first_B[row] = slot - len(prompt)
            tokens_BS[row, first_B[row] : slot] = prompt
        done_B = np.arange(rows) >= len(prompts)
        return {"tokens_BS": tokens_BS, "first_B": first_B, "done_B": done_B}, slot

    def _apply(self, weights, tokens_BT, context):
        every_BT = jnp.ones_like(tokens_BT, bool)
        return self._model.apply(
            {"params": weights.params}, tokens_BT, every_BT, weights.router, context
        )

    def _fill(self, weights, rows, length):
        """A cache of the first `length` slots.

        Slots behind the prompts are filled too; they are written again when their tokens are drawn.
        """
        cache = empty_cache(self._model.config, *rows["tokens_BS"].shape)
        context = cached(cache, rows["first_B"], 0, length)
        return self._apply(weights, rows["tokens_BS"][:, :length], context).cache

    def _extend(self, weights, cache, rows, span, rule):
        """(cache, tokens_BS) with the slots of `span` written, or fewer when all rows are done."""
        # A row has a key of its own, and a token another one by its place behind the prompt.
        key_of_row = jax.vmap(jax.random.fold_in, (None, 0))
        keys_B = key_of_row(jax.random.key(rule["seed"]), jnp.arange(len(rows["done_B"])))

        def unfinished(state):
            slot, _, _, done_B = state
            return (slot < span[1]) & ~jnp.all(done_B)

        def one(state):
            slot, cache, tokens_BS, done_B = state
            last_B1 = lax.dynamic_slice_in_dim(tokens_BS, slot - 1, 1, axis=1)
            output = self._apply(weights, last_B1, cached(cache, rows["first_B"], slot - 1, 1))
            logits_BV = output.x_BTD[:, 0].astype(jnp.float32) @ output.head_VD.T
            # The head may have more rows than the tokenizer has ids.
            known_BV = logits_BV[:, : self._tokenizer.vocab_size]
            now_B = jax.vmap(jax.random.fold_in)(keys_B, slot - rows["first_B"])
            drawn_B = draw(known_BV, now_B, rule["temperature"], rule["top_k"], rule["top_p"])
            drawn_B = drawn_B.astype(jnp.int32)
            tokens_BS = lax.dynamic_update_slice_in_dim(tokens_BS, drawn_B[:, None], slot, axis=1)
            return slot + 1, output.cache, tokens_BS, done_B | rule["stops_V"][drawn_B]

        state = (span[0], cache, rows["tokens_BS"], rows["done_B"])
        _, cache, tokens_BS, _ = lax.while_loop(unfinished, one, state)
        return cache, tokens_BS


class Sample:
    """An evaluator that continues a prompt; it finds nothing for an empty prompt."""

    def __init__(self, generator: Generator, prompt: str, sampling: Sampling):
        generator.check(prompt, sampling)
        self._generator = generator
        self._prompt = prompt
        self._sampling = sampling

    def run(self, weights: Any) -> dict[str, str]:
        """The prompt with its continuation."""
        if not self._prompt:
            return {}
        [continuation] = self._generator.run(weights, [self._prompt], self._sampling)
        return {SAMPLE.of(self._prompt).key: self._prompt + continuation}


def _power_of_two(size, least=16):
    return max(1 << (size - 1).bit_length(), least)
