"""As many experts as the paper has: E 64, K 8."""

from moe_erc.study.plan import Arm, Study
from studies import settings


def get_study() -> Study:
    """The study."""
    return Study(
        hypothesis="With 64 experts ERC and MPI couple router and experts at the same loss.",
        control="vanilla",
        arms={
            "vanilla": Arm("configs/vanilla.py:tiny"),
            "erc": Arm("configs/erc.py:tiny"),
            "mpi": Arm("configs/mpi.py:tiny"),
        },
        overrides=settings.EXPERTS_64,
        seeds=5,
        first_seed=90000,
        outcome=settings.VALIDATION,
        evaluations=settings.EVALUATIONS,
        margin=0.005,
        decision="The README says whether the number of experts changes the verdict.",
        also=(*settings.COUPLING, *settings.BALANCE),
        aa="aa_64",
    )
