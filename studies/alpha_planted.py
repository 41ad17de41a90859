"""ERC by alpha at one weight, as Figure 5 of the paper."""

from moe_erc.study.plan import Arm, Study
from studies import settings


def get_study() -> Study:
    """The study."""
    return Study(
        hypothesis="A smaller alpha couples more and narrows the noise bound.",
        control="vanilla",
        arms={
            "vanilla": Arm("configs/vanilla.py:tiny"),
            "alpha_0_4": Arm("configs/erc.py:tiny", {"losses.erc.alpha": 0.4}),
            "alpha_0_6": Arm("configs/erc.py:tiny", {"losses.erc.alpha": 0.6}),
            "alpha_0_8": Arm("configs/erc.py:tiny", {"losses.erc.alpha": 0.8}),
            "alpha_1_0": Arm("configs/erc.py:tiny", {"losses.erc.alpha": 1.0}),
            "alpha_2_0": Arm("configs/erc.py:tiny", {"losses.erc.alpha": 2.0}),
            "alpha_3_0": Arm("configs/erc.py:tiny", {"losses.erc.alpha": 3.0}),
        },
        overrides=settings.PLANTED,
        seeds=4,
        first_seed=20000,
        outcome=settings.DISTANCE,
        evaluations=settings.EVALUATIONS,
        margin=0.005,
        decision="The default alpha stays unless another one is better than vanilla.",
        also=(*settings.COUPLING, *settings.BALANCE),
        aa="aa_planted",
    )
