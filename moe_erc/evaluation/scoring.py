"""Log-probabilities of given continuations of given contexts, in one compiled shape.

    score = sum_t log p(token_t | context, tokens before t)

A continuation is greedy if no other token is likelier than any of its tokens.

Requests with the same context form a tree. The context is read once. Each continuation is read
behind it, without its last token, which is only predicted. A continuation sees the context and
itself alone, at the positions that it would have without the others. Trees fill rows side by side:

    row 0     c c c c | a a | b b b | d d d | e        a and b continue c, e continues d
    position  0 1 2 3   4 5   4 5 6   0 1 2   3
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_erc.checks import BadInput
from moe_erc.model.context import branched
from moe_erc.model.transformer import Transformer
from moe_erc.sharding import put_whole_batch, replicate

Request = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of its continuation
SHORTEST = 64  # tokens of a row
# Rows among which a place for a tree is sought. The rows before them are nearly full, and a search
# among all rows would be slow.
OPEN = 64
SLICE = 16  # scored tokens of a row whose logits exist at once


class Tree(NamedTuple):
    """A context and some of its continuations, each with the number of its request."""

    context: tuple
    continuations: list
    requests: list

    @property
    def read(self) -> int:
        """How many tokens the model reads."""
        return len(self.context) + sum(len(continuation) - 1 for continuation in self.continuations)

    @property
    def scored(self) -> int:
        """How many tokens are predicted."""
        return sum(map(len, self.continuations))


class Scorer:
    """Scores continuations under the model of `run(weights, requests)`.

    `shape_BT` is the shape of a batch with the longest rows. The number of rows is rounded up to a
    multiple of the number of devices.
    """

    def __init__(self, model: Transformer, shape_BT: tuple[int, int]):
        rows, self.limit = shape_BT
        self._mesh = model.mesh
        self._rows = -(-rows // model.mesh.size) * model.mesh.size

        @functools.partial(jax.jit, out_shardings=replicate(model.mesh))
        def score(weights, batch):
            context = branched(batch["positions_BT"], batch["trees_BT"], batch["branches_BT"])
            output = model.apply(
                {"params": weights.params},
                batch["tokens_BT"],
                batch["trees_BT"] > 0,
                weights.router,
                context,
            )
            # The head is gathered here, once, and not again for every slice.
            head_VD = lax.with_sharding_constraint(output.head_VD, replicate(model.mesh))

            def add(number, found):
                scores_BP, hits_BP = found
                start = number * SLICE
                at_BC = lax.dynamic_slice_in_dim(batch["at_BP"], start, SLICE, axis=1)
                targets_BC = lax.dynamic_slice_in_dim(batch["targets_BP"], start, SLICE, axis=1)
                scores_BC, hits_BC = _scores(output.x_BTD, head_VD, at_BC, targets_BC)
                scores_BP = lax.dynamic_update_slice_in_dim(scores_BP, scores_BC, start, axis=1)
                hits_BP = lax.dynamic_update_slice_in_dim(hits_BP, hits_BC, start, axis=1)
                return scores_BP, hits_BP

            scores_BP = jnp.zeros(batch["at_BP"].shape, jnp.float32)
            hits_BP = jnp.zeros(batch["at_BP"].shape, bool)
            slices = -(-jnp.max(batch["scored_B"]) // SLICE)
            return lax.fori_loop(0, slices, add, (scores_BP, hits_BP))

        self._score = score

    def run(self, weights: Any, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """[(log-probability, whether greedy)] of the requests, in their order.

        A context that is too long loses its beginning. BadInput for a continuation without a token,
        or with too many.
        """
        trees = grow(requests, self.limit)
        length = row_length(trees, self.limit)
        parts = []
        for tree in trees:
            parts += split(tree, length)
        rows = fill_rows(parts, length)
        # A batch has the same number of tokens, whatever the length of its rows.
        count = self._rows * (self.limit // length)
        scored = []
        for start in range(0, len(rows), count):
            batch = rows[start : start + count]
            arrays = put_whole_batch(self._mesh, _arrays(batch, count, length))
            scored.append((batch, self._score(weights, arrays)))
        # Results are fetched after all batches are dispatched: the devices compute meanwhile.
        found = [None] * len(requests)
        for batch, results in scored:
            scores_BP, hits_BP = jax.device_get(results)
            # The last batch may have fewer rows than its arrays; the others are idle.
            for row, scores_P, hits_P in zip(batch, scores_BP, hits_BP, strict=False):
                _collect(found, row, scores_P, hits_P)
        return found


def _collect(found, row, scores_P, hits_P):
    """Write the results of a row's trees into `found`, by the number of the request."""
    at = 0
    for tree in row:
        for request, continuation in zip(tree.requests, tree.continuations, strict=True):
            of = slice(at, at + len(continuation))
            score = scores_P[of].sum(dtype=np.float64)
            found[request] = (float(score), bool(hits_P[of].all()))
            at += len(continuation)


def grow(requests: Sequence[Request], limit: int) -> list[Tree]:
    """The trees of all requests, each with all continuations of its context.

    No context with one of its continuations is longer than a row of `limit` tokens.
    """
    trees = {}
    cut = 0
    for request, (context, continuation) in enumerate(requests):
        if not context:
            raise BadInput(
                "a request without a context cannot be scored; begin it with the end of text"
            )
        if not 0 < len(continuation) <= limit:
            raise BadInput(
                f"a continuation of {len(continuation)} tokens cannot be scored, 1 to {limit} can"
            )
        room = limit + 1 - len(continuation)  # the last token is predicted, not read
        cut += len(context) > room
        kept = tuple(context[-room:])
        tree = trees.setdefault(kept, Tree(kept, [], []))
        tree.continuations.append(list(continuation))
        tree.requests.append(request)
    if cut:
        line = (
            "%d of %d requests are too long for a row of %d tokens: "
            "their contexts lose the beginning"
        )
        logging.getLogger(__name__).warning(line, cut, len(requests), limit)
    return list(trees.values())


def row_length(trees: Sequence[Tree], limit: int) -> int:
    """The smallest power of two that holds every context with each continuation, or `limit`.

    Short rows make attention cheap, and trees are packed, so that little of a row is padding.
    """
    paths = [len(tree.context) + max(map(len, tree.continuations)) - 1 for tree in trees]
    return min(limit, max(SHORTEST, 1 << (max(paths, default=1) - 1).bit_length()))


def split(tree: Tree, length: int) -> list[Tree]:
    """Trees of the same context, each of which fits into a row of `length` tokens."""
    parts = []
    for request, continuation in zip(tree.requests, tree.continuations, strict=True):
        part = parts[-1] if parts else None
        if (
            part is None
            or part.read + len(continuation) - 1 > length
            or part.scored + len(continuation) > length
        ):
            part = Tree(tree.context, [], [])
            parts.append(part)
        part.continuations.append(continuation)
        part.requests.append(request)
    return parts


def fill_rows(trees: Sequence[Tree], length: int) -> list[list[Tree]]:
    """Rows of trees: each tree is in the first row with room for it, the largest tree first.

    A row reads at most `length` tokens and scores at most as many.
    """
    rows = []
    room = []  # by row, how many more tokens it can read and score
    for tree in sorted(trees, key=lambda tree: tree.read, reverse=True):
        for place in range(max(0, len(rows) - OPEN), len(rows)):
            if tree.read <= room[place][0] and tree.scored <= room[place][1]:
                break
        else:
            place = len(rows)
            rows.append([])
            room.append((length, length))
        rows[place].append(tree)
        to_read, to_score = room[place]
        room[place] = (to_read - tree.read, to_score - tree.scored)
    return rows


def _arrays(rows, count, length):
    """The rows as arrays; rows and slots that are idle score nothing."""
    batch = {}
    for name in ("tokens_BT", "positions_BT", "trees_BT", "branches_BT"):
        batch[name] = np.zeros((count, length), np.int32)
    width = -(-length // SLICE) * SLICE
    for name in ("at_BP", "targets_BP"):
        batch[name] = np.zeros((count, width), np.int32)
    batch["scored_B"] = np.zeros(count, np.int32)
    for row, trees in enumerate(rows):
        _write_row(batch, row, trees)
    return batch


def _write_row(batch, row, trees):
    """Write the trees of one row into the arrays, side by side."""
    read = 0
    scored = 0
    for number, tree in enumerate(trees, start=1):  # 0 is an idle slot
        context = len(tree.context)
        of = slice(read, read + context)
        batch["tokens_BT"][row, of] = tree.context
        batch["trees_BT"][row, of] = number
        batch["positions_BT"][row, of] = np.arange(context)
        read += context
        last_of_context = read - 1
        for branch, continuation in enumerate(tree.continuations, start=1):  # 0 is the context
            tokens = continuation[:-1]
            of = slice(read, read + len(tokens))
            batch["tokens_BT"][row, of] = tokens
            batch["trees_BT"][row, of] = number
            batch["branches_BT"][row, of] = branch
            batch["positions_BT"][row, of] = context + np.arange(len(tokens))
            # The first token is predicted by the end of the context, each other by the one before.
            of = slice(scored, scored + len(continuation))
            batch["at_BP"][row, of] = [last_of_context, *range(read, read + len(tokens))]
            batch["targets_BP"][row, of] = continuation
            read += len(tokens)
            scored += len(continuation)
    batch["scored_B"][row] = scored


def _scores(x_BTD, head_VD, at_BC, targets_BC):
    """(log-probability, whether no token is likelier) of targets, each (B, C).

    The vector at time step `at_BC` predicts the target.
    """
    x_BCD = jnp.take_along_axis(x_BTD, at_BC[..., None], axis=1, mode="clip")
    logits_BCV = jnp.einsum(
        "bcd,vd->bcv", x_BCD, head_VD.astype(x_BCD.dtype), preferred_element_type=jnp.float32
    )
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    scores_BC = target_BC - jax.nn.logsumexp(logits_BCV, axis=-1)
    return scores_BC, jnp.argmax(logits_BCV, axis=-1) == targets_BC
