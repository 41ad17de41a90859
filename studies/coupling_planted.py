"""ERC against vanilla, with the measures of Tables 2 and 3 of the paper."""

from moe_erc.study.plan import Arm, Study
from studies import settings


def get_study() -> Study:
    """The study."""
    return Study(
        hypothesis="ERC couples router and experts without shrinking gates, and lowers the loss.",
        control="vanilla",
        arms={
            "vanilla": Arm("configs/vanilla.py:tiny"),
            "erc": Arm("configs/erc.py:tiny"),
        },
        overrides=settings.PLANTED,
        seeds=16,
        first_seed=110000,
        outcome=settings.DISTANCE,
        evaluations=settings.EVALUATIONS,
        margin=0.005,
        decision="The README says whether a gain in loss is visible at this size.",
        also=settings.TABLES,
        aa="aa_planted",
    )
