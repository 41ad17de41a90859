"""Vanilla against vanilla with other seeds, at the size of coupling_small."""

from moe_erc.study.plan import Study
from studies import settings


def get_study() -> Study:
    """The study."""
    return settings.against_itself(
        "configs/vanilla.py:tiny",
        settings.SMALL,
        settings.DISTANCE,
        seeds=4,
        evaluations=3,
        margin=0.01,
    )
