"""What evaluates a model: one protocol, and the one loop over evaluators."""

from collections.abc import Iterable
from typing import Any, Protocol


class Evaluator(Protocol):
    """Made once, before training, so that what is refused ends the run before anything is
    compiled.
    """

    def run(self, weights: Any) -> dict[str, Any]:
        """What it finds of a model with these weights, by the keys of `measures/registry.py`."""
        ...


def evaluate(evaluators: Iterable[Evaluator], weights: Any) -> dict[str, Any]:
    """The measures of all, by key, in their order."""
    found = {}
    for evaluator in evaluators:
        found |= evaluator.run(weights)
    return found
