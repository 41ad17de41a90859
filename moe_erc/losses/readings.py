"""The option of a loss whose authors published one formula and released code of another."""

import dataclasses

from moe_erc.checks import among, check_fields


@dataclasses.dataclass(frozen=True)
class ReadingOptions:
    """Which of the two is computed: "paper" is the formula, "released" what the code does."""

    reading: str = among("paper", "released")

    def __post_init__(self):
        check_fields(self)
