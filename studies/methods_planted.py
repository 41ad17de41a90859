"""The same methods on the planted corpus, whose floor and regimes are known."""

from moe_erc.study.plan import Study
from studies import settings


def get_study() -> Study:
    """The study."""
    return Study(
        hypothesis=(
            "A method that couples router and experts routes regimes to experts more purely, and "
            "comes nearer to the floor."
        ),
        control="vanilla",
        arms=settings.METHODS,
        overrides=settings.PLANTED,
        seeds=16,
        first_seed=80000,
        outcome=settings.DISTANCE,
        evaluations=settings.EVALUATIONS,
        margin=0.005,
        decision="docs/methods.md has the verdict of each method.",
        also=("router/purity", *settings.BALANCE),
        aa="aa_planted",
    )
