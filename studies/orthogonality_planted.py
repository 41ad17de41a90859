"""Router orthogonality beside ERC, as Figure 6c of the paper."""

from moe_erc.study.plan import Arm, Study
from studies import settings


def get_study() -> Study:
    """The study."""
    return Study(
        hypothesis="Router orthogonality adds nothing to ERC.",
        control="erc",
        arms={
            "erc": Arm("configs/erc.py:tiny"),
            "orthogonality": Arm("configs/router_orthogonality.py:tiny"),
            "both": Arm("configs/combinations/erc_router_orthogonality.py:tiny"),
        },
        overrides=settings.PLANTED,
        seeds=8,
        first_seed=60000,
        outcome=settings.DISTANCE,
        evaluations=settings.EVALUATIONS,
        margin=0.005,
        decision="docs/methods.md says whether the two are worth combining.",
        also=(*settings.COUPLING, "weights/row_cosine"),
        aa="aa_planted",
    )
