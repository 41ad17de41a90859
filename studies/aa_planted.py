"""Vanilla against vanilla with other seeds, on the planted corpus."""

from moe_erc.study.plan import Study
from studies import settings


def get_study() -> Study:
    """The study."""
    return settings.against_itself(
        "configs/vanilla.py:tiny",
        settings.PLANTED,
        settings.DISTANCE,
        seeds=8,
        also=("router/purity", *settings.BALANCE),
    )
