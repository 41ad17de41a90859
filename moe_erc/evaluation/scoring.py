"""Log-probabilities of given continuations of given contexts, in few compiled shapes.

    score = sum_t log p(token_t | context, tokens before t);   greedy: no token_t has a likelier one beside it

A row is what the model reads: the context and a continuation but for its last token. Continuations that differ in the
last token alone, as answers of one token do, share the row. Rows go by length, longest first, in batches of as many
tokens at any of at most three lengths; the head meets a slice of time at once, and only where something is scored.
"""

import collections
import functools
import itertools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_erc.sharding import put_whole_batch, replicate

LENGTHS = 3  # shapes that are compiled for one set of requests
SHORTEST = 16  # of these lengths
ENDS = 8  # last tokens that share a row
SLICE = 16  # time steps of a row whose logits exist at once


class Row(NamedTuple):
    """What the model reads, and which requests it answers."""

    tokens_T: np.ndarray
    first: int  # the time step that predicts the first scored token
    ends: list[int]  # last tokens to score, one for each request
    requests: list[int]


class Scorer:
    """Scores continuations under the model of `run(weights, requests)`.

    `shape_BT` is a batch at the longest a row may be; it is filled up to a row for every device.
    """

    def __init__(self, model, shape_BT):
        rows, self.limit = shape_BT
        self._mesh, self._rows = model.mesh, -(-rows // model.mesh.size) * model.mesh.size

        @functools.partial(jax.jit, out_shardings=replicate(model.mesh))
        def score(weights, batch):
            tokens_BT, last_B = batch["tokens_BT"], batch["last_B"]
            mask_BT = jnp.arange(tokens_BT.shape[1]) <= last_B[:, None]
            output = model.apply({"params": weights.params}, tokens_BT, mask_BT, weights.router)
            head_VD = jax.lax.with_sharding_constraint(output.head_VD, replicate(model.mesh))  # once, not every slice

            def add(number, sums):
                return jax.tree.map(jnp.add, sums, _slice_scores(output.x_BTD, head_VD, batch, number))

            slices = jnp.max((last_B - batch["first_B"]) // SLICE + 1)
            zeros_BK = jnp.zeros(batch["ends_BK"].shape, jnp.float32)
            return jax.lax.fori_loop(0, slices, add, (zeros_BK, zeros_BK))

        self._score = score

    def run(self, weights, requests):
        """[(log-probability, greedy)] of (context, continuation) pairs of token ids, in their order.

        Too long a context loses its beginning. ValueError for a continuation that has no token, or too many.
        """
        rows = gather_rows(requests, self.limit)
        lengths = choose_lengths([len(row.tokens_T) for row in rows], self.limit)
        found, scored = [None] * len(requests), []
        while rows:
            length = min(length for length in lengths if length >= len(rows[0].tokens_T))
            count = self._rows * (self.limit // length)
            scored.append(
                (rows[:count], self._score(weights, put_whole_batch(self._mesh, _batch(rows, count, length))))
            )
            rows = rows[count:]
        for batch, sums in scored:  # the devices are at work on the next by now
            for row, scores_K, misses_K in zip(batch, *jax.device_get(sums), strict=False):  # the rest is idle
                for request, score, misses in zip(row.requests, scores_K, misses_K, strict=False):
                    found[request] = float(score), bool(misses == 0)
        return found


def gather_rows(requests, limit):
    """The rows that answer all requests, longest first, of at most `limit` tokens."""
    rows, unfilled, cut = [], {}, 0
    for request, (context, continuation) in enumerate(requests):
        if not 0 < len(continuation) <= limit:
            raise ValueError(f"tasks: a continuation of {len(continuation)} tokens cannot be scored, 1 to {limit} can")
        cut += len(context) + len(continuation) > limit + 1
        window_T = np.array([*context, *continuation][-limit - 1 :], np.int32)
        tokens_T, key = window_T[:-1], (len(continuation), window_T[:-1].tobytes())
        row = unfilled.get(key)
        if row is None or len(row.ends) == ENDS:
            row = unfilled[key] = Row(tokens_T, len(tokens_T) - len(continuation), [], [])
            rows.append(row)
        row.ends.append(window_T[-1])
        row.requests.append(request)
    if cut:
        line = "%d of %d requests are too long for a row of %d tokens: their contexts lose the beginning"
        logging.getLogger(__name__).warning(line, cut, len(requests), limit)
    return sorted(rows, key=lambda row: len(row.tokens_T), reverse=True)


def choose_lengths(needed, limit):
    """The powers of two, or `limit` for one beyond, to fill rows of the `needed` lengths up to at the least cost."""
    counts = collections.Counter(min(max(1 << (length - 1).bit_length(), SHORTEST), limit) for length in needed)
    *shorter, longest = sorted(counts) or [limit]
    choices = itertools.chain(*(itertools.combinations(shorter, count) for count in range(LENGTHS)))

    def padded(lengths):
        return sum(count * min(end for end in lengths if end >= length) for length, count in counts.items())

    return min(((*some, longest) for some in choices), key=padded)


def _batch(rows, count, length):
    """The first `count` rows as arrays; what they leave idle scores nothing."""
    batch = {
        "tokens_BT": np.zeros((count, length), np.int32),
        "first_B": np.zeros(count, np.int32),
        "last_B": np.full(count, -1, np.int32),  # the time step that predicts the ends
        "ends_BK": np.zeros((count, ENDS), np.int32),
    }
    for place, row in enumerate(rows[:count]):
        batch["tokens_BT"][place, : len(row.tokens_T)] = row.tokens_T
        batch["first_B"][place], batch["last_B"][place] = row.first, len(row.tokens_T) - 1
        batch["ends_BK"][place, : len(row.ends)] = row.ends
    return batch


def _slice_scores(x_BTD, head_VD, batch, number):
    """(log-probability, tokens that are not the likeliest) of what one slice of time predicts, (B, K) each."""
    at_BC = batch["first_B"][:, None] + number * SLICE + jnp.arange(SLICE)
    last_B1 = batch["last_B"][:, None]
    x_BCD = jnp.take_along_axis(x_BTD, at_BC[..., None], axis=1, mode="clip")
    logits_BCV = jnp.einsum("bcd,vd->bcv", x_BCD, head_VD.astype(x_BCD.dtype), preferred_element_type=jnp.float32)
    next_BC = jnp.take_along_axis(batch["tokens_BT"], at_BC + 1, axis=1, mode="clip")
    target_BCK = jnp.where((at_BC == last_B1)[..., None], batch["ends_BK"][:, None], next_BC[..., None])
    score_BCK = jnp.take_along_axis(logits_BCV, target_BCK, axis=-1) - jax.nn.logsumexp(logits_BCV, -1, keepdims=True)
    missed_BCK = jnp.argmax(logits_BCV, axis=-1, keepdims=True) != target_BCK
    counted_BC1 = (at_BC <= last_B1)[..., None]
    return tuple(jnp.sum(leaf * counted_BC1, axis=1) for leaf in (score_BCK, missed_BCK.astype(jnp.float32)))
