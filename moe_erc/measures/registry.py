"""The table of all measures, and the groups in which tables and figures show them.

To add one: a file beside this one, and a line in `_ALL`. A new group, the part of a key before the
slash, is a line in `GROUPS` as well.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_erc.measures import (
    coupling,
    dropped_tokens,
    erc,
    expert_use,
    load,
    output_cosine,
    probability_entropy,
    purity,
    training,
    validation,
    weights,
)
from moe_erc.measures.base import Measure, Reads

_ALL = (
    *training.MEASURES,
    *validation.MEASURES,
    *erc.MEASURES,
    *coupling.MEASURES,
    *weights.MEASURES,
    output_cosine.OUTPUT_COSINE,
    *load.MEASURES,
    probability_entropy.PROBABILITY_ENTROPY,
    dropped_tokens.DROPPED_TOKENS,
    purity.PURITY,
    *expert_use.MEASURES,
)
MEASURES = {measure.key: measure for measure in _ALL}


class Group(NamedTuple):
    """The title of a table and of figures, and what there is to see in them."""

    title: str
    caption: str


GROUPS = {
    "loss": Group("Training losses", "Losses on training batches."),
    "validation": Group(
        "Validation loss", "Cross-entropy on validation text, by domain and as the mean of domains."
    ),
    "tasks": Group("Tasks", "What is reached in tasks of the harness."),
    "erc": Group(
        "ERC of the clean router",
        "A layer is coupled where its vanishing alpha is at most 1. Its ERC at alpha 1 is then 0. "
        "These measures describe coupling, not quality.",
    ),
    "coupling": Group(
        "Coupling",
        "A router couples to its experts as the diagonal leads in every row and column, and as its "
        "rows turn to the strongest direction of their gates. A falling noise bound says that "
        "router rows move together. These measures describe coupling, not quality "
        "(arXiv 2606.10703).",
    ),
    "weights": Group(
        "Router rows and gates",
        "A loss that couples by shrinking weights, and not by turning them, makes norms smaller.",
    ),
    "experts": Group(
        "Experts",
        "Output cosine is that of what two experts answer to the same token: the lower it is, the "
        "more specialised they are.",
    ),
    "router": Group(
        "Routing",
        "Experts are evenly loaded where the highest load is near 1 and the load entropy near 1.",
    ),
    "use": Group(
        "Use of experts",
        "How much the domains differ in the experts they use, 0 if in nothing; and the share of a "
        "token's occurrences that its most used expert sees, K / E if use is even.",
    ),
}


def find(key: str) -> Measure | None:
    """The measure of a key, or the member of a family; None for a key that is neither."""
    if key in MEASURES:
        return MEASURES[key]
    family, _, name = key.partition("/")
    return MEASURES[family].of(name) if family in MEASURES else None


def of_group(group: str, keys: Iterable[str]) -> list[Measure]:
    """The measures of a group among these keys, in the order of the table."""
    members = [measure for measure in map(find, keys) if measure and measure.group == group]
    order = list(MEASURES)

    def place(measure):
        return order.index(measure.key if measure.key in MEASURES else measure.group)

    return sorted(members, key=place)


def reading(what: Reads) -> tuple[Measure, ...]:
    """The measures that are computed from `what`."""
    return tuple(measure for measure in MEASURES.values() if measure.reads == what)


def of_load(load_LE: Any) -> dict[str, jax.Array]:
    """Every measure of the load, by key, (L,) each.

    `load_LE` may be shares or counts. A layer of zeros counts as even.
    """
    share_LE = load.shares(load_LE)
    return {measure.key: measure.compute(share_LE) for measure in reading("load")}


def curves(found: Mapping[str, Any]) -> dict[str, Any]:
    """The measures that go to metrics.jsonl: numbers, and vectors by layer."""
    kept = {}
    for key, value in found.items():
        if not isinstance(value, str) and np.ndim(value) <= 1:
            kept[key] = value
    return kept
