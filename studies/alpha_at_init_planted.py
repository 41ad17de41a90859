"""ERC by alpha, with the weight such that all alphas begin at one strength."""

from moe_erc.study.plan import Arm, Study
from studies import settings


def get_study() -> Study:
    """The study."""
    return Study(
        hypothesis=(
            "The loss of step 0 is about 8 times as large at alpha 0.4 as at 1, so much of what "
            "alpha_planted shows is the strength of the loss and not alpha."
        ),
        control="vanilla",
        arms={
            "vanilla": Arm("configs/vanilla.py:tiny"),
            "alpha_0_4": Arm(
                "configs/erc.py:tiny", {"losses.erc.alpha": 0.4, "losses.erc.weight_at_init": 0.01}
            ),
            "alpha_0_6": Arm(
                "configs/erc.py:tiny", {"losses.erc.alpha": 0.6, "losses.erc.weight_at_init": 0.01}
            ),
            "alpha_0_8": Arm(
                "configs/erc.py:tiny", {"losses.erc.alpha": 0.8, "losses.erc.weight_at_init": 0.01}
            ),
            "alpha_1_0": Arm(
                "configs/erc.py:tiny", {"losses.erc.alpha": 1.0, "losses.erc.weight_at_init": 0.01}
            ),
        },
        overrides=settings.PLANTED,
        seeds=4,
        first_seed=30000,
        outcome=settings.DISTANCE,
        evaluations=settings.EVALUATIONS,
        margin=0.005,
        decision="docs/erc.md says whether weight_at_init is to be used when alpha is swept.",
        also=(*settings.COUPLING, *settings.BALANCE),
        aa="aa_planted",
    )
