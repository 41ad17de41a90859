"""What of an expert ERC measures, as Figure 6a of the paper."""

from moe_erc.study.plan import Arm, Study
from studies import settings


def get_study() -> Study:
    """The study."""
    return Study(
        hypothesis="The gate is as good as the other activations.",
        control="gate",
        arms={
            "gate": Arm("configs/erc.py:tiny"),
            "up": Arm("configs/erc.py:tiny", {"losses.erc.activation": "up"}),
            "silu_gate": Arm("configs/erc.py:tiny", {"losses.erc.activation": "silu_gate"}),
            "swiglu": Arm("configs/erc.py:tiny", {"losses.erc.activation": "swiglu"}),
            "output": Arm("configs/erc.py:tiny", {"losses.erc.activation": "output"}),
        },
        overrides=settings.PLANTED,
        seeds=4,
        first_seed=50000,
        outcome=settings.DISTANCE,
        evaluations=settings.EVALUATIONS,
        margin=0.005,
        decision="The default stays gate unless another activation is better.",
        also=settings.COUPLING,
        aa="aa_planted",
    )
