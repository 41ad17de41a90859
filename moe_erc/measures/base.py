"""What a measure is: its one name, everywhere, and how it is computed.

The part of a key before the slash is the group of the measure. A group has a table and figures.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

Reads = Literal["load", "layer", "matrix", "weights"]


def always(config: Any) -> bool:
    """Of a measure that every model has."""
    return True


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number that is written to metrics.jsonl and report.json, and shown in tables and figures.

    A measure without `compute` is found by what its file names. Otherwise `reads` says what
    `compute` is given:

      "load"     share_LE, the shares of the experts, float32 -> (L,)
                 at every step, and of the validation text
      "layer"    the `Observation` of one layer (`moe/layer.py`) on the fixed batch -> scalar
      "matrix"   M_EE, the coupling matrix of one layer, float32 -> scalar
      "weights"  router_ED and gate_norm_E of one layer -> scalar

    It is jax code in each case. A model without router rows has no "matrix" and no "weights".
    `applies(model config)` says whether a model has a measure of a "layer".
    """

    key: str  # "GROUP/NAME"; of a family, such as a loss for every domain, "GROUP" alone
    label: str
    unit: str
    per_layer: bool  # whether the value has an axis of layers
    compute: Callable | None = None
    better: Literal["higher", "lower"] | None = None
    reads: Reads | None = None
    applies: Callable[[Any], bool] = always
    digits: int = 3  # behind the point, in tables

    @property
    def group(self) -> str:
        """The table and the figures that show it."""
        return self.key.partition("/")[0]

    @property
    def name(self) -> str:
        """The key without its group."""
        return self.key.partition("/")[2]

    @property
    def axis(self) -> str:
        """The label of an axis: with the unit, and with what is better."""
        better = f"{self.better} is better" if self.better else ""
        told = ", ".join(text for text in (self.unit, better) if text)
        return f"{self.label} ({told})" if told else self.label

    def of(self, name: str) -> "Measure":
        """The member of this family that is called so, such as that of one domain."""
        return dataclasses.replace(self, key=f"{self.key}/{name}", label=f"{self.label}, {name}")

    def show(self, value: float) -> str:
        """The cell of a table."""
        return f"{value:,.{self.digits}f}"
