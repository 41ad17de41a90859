"""Log-probabilities of given continuations of given contexts, in one compiled shape.

    score = sum_t log p(token_t | context, tokens before t);   greedy: no token_t has a likelier one beside it

Requests of one context share it: the context is read once, and behind it each continuation but for
its last token, which sees the context and itself alone, at the positions it would have there. Such
trees fill rows side by side:

    row 0     c c c c | a a | b b b | d d d | e        a and b continue c, e continues d
    position  0 1 2 3   4 5   4 5 6   0 1 2   3
"""

import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_erc.checks import BadInput
from moe_erc.model.context import branched
from moe_erc.sharding import put_whole_batch, replicate

SHORTEST = 64  # row
# rows that may still be filled: the first ones are full, and a search among all would take its time
OPEN = 64
SLICE = 16  # scored tokens of a row whose logits exist at once


class Tree(NamedTuple):
    """A context and some of what continues it, with the number of each continuation's request."""

    context: tuple
    continuations: list
    requests: list

    @property
    def read(self):
        """How many tokens the model reads."""
        return len(self.context) + sum(len(continuation) - 1 for continuation in self.continuations)

    @property
    def scored(self):
        """How many tokens are predicted."""
        return sum(map(len, self.continuations))


class Scorer:
    """Scores continuations under the model of `run(weights, requests)`.

    `shape_BT` is a batch at the longest a row may be; it is filled up to a row for every device.
    """

    def __init__(self, model, shape_BT):
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
            head_VD = lax.with_sharding_constraint(
                output.head_VD, replicate(model.mesh)
            )  # once, not every slice

            def add(number, found):
                cut = functools.partial(
                    lax.dynamic_slice_in_dim, start_index=number * SLICE, slice_size=SLICE, axis=1
                )
                put = functools.partial(
                    lax.dynamic_update_slice_in_dim, start_index=number * SLICE, axis=1
                )
                return jax.tree.map(
                    put,
                    found,
                    _scores(output.x_BTD, head_VD, cut(batch["at_BP"]), cut(batch["targets_BP"])),
                )

            nothing = (
                jnp.zeros(batch["at_BP"].shape, jnp.float32),
                jnp.zeros(batch["at_BP"].shape, bool),
            )
            return lax.fori_loop(0, -(-jnp.max(batch["scored_B"]) // SLICE), add, nothing)

        self._score = score

    def run(self, weights, requests):
        """[(log-probability, greedy)] of (context, continuation) pairs of token ids, in their order.

        Too long a context loses its beginning. ValueError for a continuation that has no token, or
        too many.
        """
        trees = grow(requests, self.limit)
        length = row_length(trees, self.limit)
        rows = fill_rows([part for tree in trees for part in split(tree, length)], length)
        count = self._rows * (self.limit // length)
        found = [None] * len(requests)
        scored = []
        for start in range(0, len(rows), count):
            batch = rows[start : start + count]
            scored.append(
                (
                    batch,
                    self._score(
                        weights, put_whole_batch(self._mesh, _arrays(batch, count, length))
                    ),
                )
            )
        for batch, results in scored:  # the devices are at work on the next by now
            for row, scores_P, hits_P in zip(
                batch, *jax.device_get(results), strict=False
            ):  # the rest is idle
                at = 0
                for tree in row:
                    for request, continuation in zip(
                        tree.requests, tree.continuations, strict=True
                    ):
                        of = slice(at, at + len(continuation))
                        found[request] = (
                            float(scores_P[of].sum(dtype=np.float64)),
                            bool(hits_P[of].all()),
                        )
                        at += len(continuation)
        return found


def grow(requests, limit):
    """The trees of all requests, each with all continuations of its context.

    No path is longer than `limit`.
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
        line = "%d of %d requests are too long for a row of %d tokens: their contexts lose the beginning"
        logging.getLogger(__name__).warning(line, cut, len(requests), limit)
    return list(trees.values())


def row_length(trees, limit):
    """A power of two that holds every path, or `limit`: attention costs by the length of a row, padding is packed."""
    paths = [len(tree.context) + max(map(len, tree.continuations)) - 1 for tree in trees]
    return min(limit, max(SHORTEST, 1 << (max(paths, default=1) - 1).bit_length()))


def split(tree, length):
    """Trees of the same context that fit a row each."""
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


def fill_rows(trees, length):
    """Lists of trees, the largest first, each in the first row with room for it.

    As many tokens are scored at most.
    """
    rows = []
    room = []
    for tree in sorted(trees, key=lambda tree: tree.read, reverse=True):
        for place in range(max(0, len(rows) - OPEN), len(rows)):
            if tree.read <= room[place][0] and tree.scored <= room[place][1]:
                break
        else:
            place = len(rows)
            rows.append([])
            room.append((length, length))
        rows[place].append(tree)
        room[place] = room[place][0] - tree.read, room[place][1] - tree.scored
    return rows


def _arrays(rows, count, length):
    """The rows as arrays; what they leave idle scores nothing."""
    names = ("tokens_BT", "positions_BT", "trees_BT", "branches_BT", "at_BP", "targets_BP")
    width = -(-length // SLICE) * SLICE
    batch = {
        name: np.zeros((count, width if name.endswith("P") else length), np.int32) for name in names
    }
    batch["scored_B"] = np.zeros(count, np.int32)
    for row, trees in enumerate(rows):
        read = scored = 0
        for number, tree in enumerate(trees, start=1):
            context = len(tree.context)
            root = read
            for branch, continuation in enumerate(((), *tree.continuations)):
                tokens = continuation[:-1] if branch else tree.context
                of = slice(read, read + len(tokens))
                batch["tokens_BT"][row, of] = tokens
                batch["trees_BT"][row, of] = number
                batch["branches_BT"][row, of] = branch
                batch["positions_BT"][row, of] = np.arange(len(tokens)) + (context if branch else 0)
                if branch:
                    of = slice(scored, scored + len(continuation))
                    batch["at_BP"][row, of] = [root + context - 1, *range(read, read + len(tokens))]
                    batch["targets_BP"][row, of] = continuation
                    scored += len(continuation)
                read += len(tokens)
        batch["scored_B"][row] = scored
    return batch


def _scores(x_BTD, head_VD, at_BC, targets_BC):
    """(log-probability, whether no token is likelier) of targets, each predicted by the vector at a time step."""
    x_BCD = jnp.take_along_axis(x_BTD, at_BC[..., None], axis=1, mode="clip")
    logits_BCV = jnp.einsum(
        "bcd,vd->bcv", x_BCD, head_VD.astype(x_BCD.dtype), preferred_element_type=jnp.float32
    )
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    return target_BC - jax.nn.logsumexp(logits_BCV, axis=-1), jnp.argmax(
        logits_BCV, axis=-1
    ) == targets_BC
