"""Vanilla against vanilla with other seeds, at mini on one GPU."""

from moe_erc.study.plan import Study
from studies import settings


def get_study() -> Study:
    """The study."""
    return settings.against_itself(
        "configs/vanilla.py:mini", settings.QUIET, settings.VALIDATION, seeds=5
    )
