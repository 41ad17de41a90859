"""Vanilla against vanilla with other seeds, on the planted corpus."""

from moe_erc.study.plan import Arm, Study
from studies import settings


def get_study() -> Study:
    """The study."""
    return Study(
        hypothesis="Arms that differ in their seeds alone do not differ in distance to the floor.",
        control="vanilla",
        arms={"vanilla": Arm("configs/vanilla.py:tiny"), "again": Arm("configs/vanilla.py:tiny")},
        overrides=settings.PLANTED,
        is_aa=True,
        seeds=8,
        outcome=settings.DISTANCE,
        evaluations=settings.EVALUATIONS,
        margin=0.005,
        decision="Where the interval excludes 0, no verdict of a study of this size is printed.",
        also=("router/purity", *settings.BALANCE),
    )
