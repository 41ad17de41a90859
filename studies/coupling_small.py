"""ERC against vanilla on the planted corpus, in minutes on a CPU."""

from moe_erc.study.plan import Arm, Study
from studies import settings


def get_study() -> Study:
    """The study."""
    return Study(
        hypothesis="ERC changes the distance to the floor of a small model by less than 0.01 nats.",
        control="vanilla",
        arms={"vanilla": Arm("configs/vanilla.py:tiny"), "erc": Arm("configs/erc.py:tiny")},
        overrides=settings.SMALL,
        seeds=4,
        first_seed=10_000,
        outcome=settings.DISTANCE,
        evaluations=3,
        margin=0.01,
        decision="None: the study shows how studies work, and is too small for a claim.",
        also=(*settings.COUPLING, "router/purity", *settings.BALANCE),
        aa="aa_small",
    )
