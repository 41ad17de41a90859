"""The noise of ERC: drawn, integrated out, and none, as Figure 6b of the paper."""

from moe_erc.study.plan import Arm, Study
from studies import settings


def get_study() -> Study:
    """The study."""
    return Study(
        hypothesis=(
            "At alpha 1 the noise has almost no mean effect: it raises all entries of a row of the "
            "matrix alike where gate rows have equal norms."
        ),
        control="uniform",
        arms={
            "uniform": Arm("configs/erc.py:tiny"),
            "expected": Arm("configs/erc.py:tiny", {"losses.erc.noise": "expected"}),
            "none": Arm("configs/erc.py:tiny", {"losses.erc.noise": "none"}),
        },
        overrides=settings.PLANTED,
        seeds=8,
        first_seed=40000,
        outcome=settings.DISTANCE,
        evaluations=settings.EVALUATIONS,
        margin=0.005,
        decision="Where all are equivalent, docs/erc.md recommends the expected noise.",
        also=settings.COUPLING,
        aa="aa_planted",
    )
