"""What a study is: a file that says before its runs what is asked, and how the answer is judged.

    def get_study():
        return Study(
            hypothesis="ERC lowers the validation loss.",
            control="vanilla",
            arms={"vanilla": Arm("configs/vanilla.py:tiny"), "erc": Arm("configs/erc.py:tiny")},
            seeds=8,
            outcome="validation/mean",
            margin=0.005,
            decision="The README says which verdict was found.",
        )

A run is one arm with one seed. Every run of a study has a seed of its own, so that the samples of
two arms are independent. `arms.py` resolves a study into its runs.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from moe_erc.checks import BadInput, check_fields, one_of, within
from moe_erc.study.statistics import LEAST_RUNS

SEEDS_OF_AN_ARM = 1000  # the distance between the first seeds of two arms


@dataclasses.dataclass(frozen=True)
class Arm:
    """A configuration: a file as `train.py --config` takes it, and keys with other values."""

    config: str  # FILE[:SIZE]
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A question, its arms, and how the answer is judged.

    Raises:
      BadInput: for a control that is no arm, for fewer than two arms, and for a number out of its
        range.
    """

    hypothesis: str  # one sentence
    control: str  # the arm that the others are compared with
    arms: Mapping[str, Arm]
    seeds: int = within(LEAST_RUNS, SEEDS_OF_AN_ARM)  # runs of every arm
    # Runs of the control; 0 takes sqrt(k) times those of each of the k other arms.
    control_seeds: int = within(0, SEEDS_OF_AN_ARM, default=0)
    first_seed: int = within(0, 2**31, default=0)  # of the first arm; other studies use others
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of every arm
    outcome: str  # the key of a measure
    evaluations: int = within(least=1, default=1)  # the last ones, whose mean is the outcome
    margin: float = within(above=0)  # the largest difference that counts as none
    confidence: float = within(above=0.5, below=1, default=0.95)
    decision: str  # what follows from which verdict
    also: tuple[str, ...] = ()  # keys of measures that the report shows beside the outcome
    is_aa: bool = False  # an A/A study: its arms differ in their seeds alone
    aa: str = ""  # the name of the A/A study of this size, a file beside this one

    def __post_init__(self):
        check_fields(self, "study")
        if len(self.arms) < 2:
            raise BadInput(
                f"study.arms: {list(self.arms)} are too few; give the control and another"
            )
        one_of("study.control", self.control, self.arms)
        for name, arm in self.arms.items():
            if not name.isidentifier():
                raise BadInput(
                    f"study.arms: {name!r} names no directory; use letters, digits and _"
                )
            if not isinstance(arm, Arm):
                raise BadInput(f"study.arms: {name!r} is {arm!r}; give an Arm")

    @property
    def others(self) -> list[str]:
        """The arms that are compared with the control."""
        return [name for name in self.arms if name != self.control]

    def runs_of(self, arm: str) -> int:
        """How many runs the plan has of an arm."""
        if arm != self.control:
            return self.seeds
        return self.control_seeds or math.ceil(math.sqrt(len(self.others)) * self.seeds)

    def seeds_of(self, arm: str) -> range:
        """The seeds of the runs of an arm; no two arms share one."""
        first = self.first_seed + list(self.arms).index(arm) * SEEDS_OF_AN_ARM
        return range(first, first + self.runs_of(arm))

    def with_seeds(self, seeds: int | None) -> "Study":
        """The same with so many runs of every arm; the control has sqrt(k) times as many."""
        if seeds is None:
            return self
        return dataclasses.replace(self, seeds=seeds, control_seeds=0)
