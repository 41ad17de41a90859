"""Vanilla against vanilla with other seeds, at the size of experts_64."""

from moe_erc.study.plan import Study
from studies import settings


def get_study() -> Study:
    """The study."""
    return settings.against_itself(
        "configs/vanilla.py:tiny", settings.EXPERTS_64, settings.VALIDATION, seeds=5
    )
