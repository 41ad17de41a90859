"""ERC and MPI at mini, between tiny and small, on one GPU."""

from moe_erc.study.plan import Arm, Study
from studies import settings


def get_study() -> Study:
    """The study."""
    return Study(
        hypothesis="ERC and MPI lower the validation loss of a model of 15 M active parameters.",
        control="vanilla",
        arms={
            "vanilla": Arm("configs/vanilla.py:mini"),
            "erc": Arm("configs/erc.py:mini"),
            "mpi": Arm("configs/mpi.py:mini"),
        },
        overrides=settings.QUIET,
        seeds=5,
        first_seed=100000,
        outcome=settings.VALIDATION,
        evaluations=settings.EVALUATIONS,
        margin=0.005,
        decision="The README says whether a gain in loss is visible at this size.",
        also=(*settings.COUPLING, *settings.BALANCE),
        aa="aa_mini",
    )
