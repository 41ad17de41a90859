"""Vanilla against vanilla with other seeds, at tiny on the embedded corpus."""

from moe_erc.study.plan import Study
from studies import settings


def get_study() -> Study:
    """The study."""
    return settings.against_itself(
        "configs/vanilla.py:tiny", settings.TINY, settings.VALIDATION, seeds=8
    )
