"""Which source each row of a batch comes from.

It is a pure function of the number of the row, and follows the weights exactly.

Sources take turns on a schedule that repeats after sum(weights) rows. In such a period each source
has given exactly `weight` rows, which are spread evenly. `grain.MapDataset.mix` does the same for
weights that it rounds first.
"""

import fractions
import math
from collections.abc import Sequence

import grain
import numpy as np

from moe_erc.checks import BadInput

_LONGEST_SCHEDULE = 10**6
# The length of a mixture. It stays below the largest one that grain takes in batches of one row.
_ENDLESS = 2**62


def whole_weights(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the same proportion.

    Decimals are read as they are written: (0.3, 0.7) gives (3, 7).
    """
    written = [fractions.Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(weight.denominator for weight in written))
    whole = [int(weight * common) for weight in written]
    smallest = [weight // math.gcd(*whole) for weight in whole]
    if sum(smallest) > _LONGEST_SCHEDULE:
        raise BadInput(
            f"data.weights: {tuple(weights)} have too many digits to mix exactly; "
            "give whole numbers, such as (2, 1)"
        )
    return smallest


class Mixture(grain.transforms.DatasetSelectionMap):
    """The window of every row: number of the row -> (source, windows drawn from it before).

    The numbers count the `rows` of all batches. `start_row` is how many rows were drawn before the
    first of these batches, in batches of any size.
    """

    def __init__(
        self, weights: Sequence[int], batch_size: int, rows: Sequence[int], start_row: int = 0
    ):
        # The j-th of a source's turns in a period comes at time (j + 1/2) / weight.
        times = np.concatenate([(np.arange(weight) + 0.5) / weight for weight in weights])
        order = np.argsort(times, kind="stable")
        self._weights = list(weights)
        self._sources = np.repeat(np.arange(len(weights)), weights)[order]
        self._turns = np.concatenate([np.arange(weight) for weight in weights])[order]
        self._batch_size = batch_size
        self._rows = rows
        self._start_row = start_row

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> tuple[int, int]:
        batch, number = divmod(index, len(self._rows))
        row = self._start_row + batch * self._batch_size + self._rows[number]
        period, turn = divmod(row, len(self._sources))
        source = int(self._sources[turn])
        return source, period * self._weights[source] + int(self._turns[turn])
