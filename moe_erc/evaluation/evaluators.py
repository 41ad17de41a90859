"""The protocol of evaluators, and the loop over them."""

from collections.abc import Iterable
from typing import Any, Protocol


class Evaluator(Protocol):
    """Measures a model.

    An evaluator is made before training, so that bad input ends the run before any compilation.
    """

    def run(self, weights: Any) -> dict[str, Any]:
        """The measures of the model with these weights, by the keys of `measures/registry.py`."""
        ...


def evaluate(evaluators: Iterable[Evaluator], weights: Any) -> dict[str, Any]:
    """The measures of all evaluators, by key, in the order of the evaluators."""
    found = {}
    for evaluator in evaluators:
        found |= evaluator.run(weights)
    return found
