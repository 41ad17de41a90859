"""Eight methods against vanilla, at tiny on the embedded corpus."""

from moe_erc.study.plan import Study
from studies import settings


def get_study() -> Study:
    """The study."""
    return Study(
        hypothesis=(
            "No method differs from vanilla by more than 0.02 nats at this size, and ERC beside "
            "MPI has little left to do."
        ),
        control="vanilla",
        arms=settings.METHODS,
        overrides=settings.TINY,
        seeds=8,
        control_seeds=16,
        first_seed=70000,
        outcome=settings.VALIDATION,
        evaluations=settings.EVALUATIONS,
        margin=0.005,
        decision="docs/methods.md has the verdict of each method.",
        also=(*settings.BALANCE, "router/load_entropy", "experts/output_cosine"),
        aa="aa_tiny",
    )
