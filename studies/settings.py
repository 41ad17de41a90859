"""What several studies have in common: arms, and the settings of their runs."""

from collections.abc import Mapping
from typing import Any

from moe_erc.study.plan import Arm, Study

# What no study reads: text drawn at evaluations, and curves for TensorBoard.
QUIET = {"eval.prompt": "", "log.tensorboard": False}

# A model of 0.2 M parameters on the planted corpus, whose entropy is known: a run takes less than a
# minute on one core. Few windows are read at evaluations.
SMALL = {
    **QUIET,
    "data.sources": ("planted",),
    "data.sequence_length": 128,
    "model.layers": 2,
    "model.width": 64,
    "model.heads": 2,
    "model.kv_heads": 2,
    "model.experts": 8,
    "model.experts_per_token": 2,
    "model.expert_width": 32,
    "model.vocab_size": 257,
    "train.steps": 1000,
    "eval.every": 50,
    "eval.windows": 8,
    "eval.report_windows": 32,
    "log.every": 50,
    "checkpoint.every": 200,
}

# The same model on a shorter alphabet, trained longer. docs/studies.md has the settings that were
# tried, and their deviations over seeds.
PLANTED = {
    **SMALL,
    "data.planted.alphabet": 12,
    "train.steps": 2000,
    "eval.every": 100,
    "log.every": 100,
    "checkpoint.every": 500,
}
EVALUATIONS = 5  # at the end of a run, whose mean is the outcome

# The size `tiny` on the embedded corpus, for twice as long as its config says.
TINY = {**QUIET, "train.steps": 1200, "eval.every": 40}

# The size `tiny` with as many experts as the paper has, each a quarter as wide.
EXPERTS_64 = {
    **TINY,
    "model.experts": 64,
    "model.experts_per_token": 8,
    "model.expert_width": 16,
}

# The arms of the studies that compare methods.
METHODS = {
    "vanilla": Arm("configs/vanilla.py:tiny"),
    "erc": Arm("configs/erc.py:tiny"),
    "mpi": Arm("configs/mpi.py:tiny"),
    "erc_mpi": Arm("configs/combinations/erc_mpi.py:tiny"),
    "aoe": Arm("configs/aoe.py:tiny"),
    "simbal": Arm("configs/simbal.py:tiny"),
    "loss_free": Arm("configs/loss_free.py:tiny"),
    "expert_orthogonality": Arm("configs/expert_orthogonality.py:tiny"),
}

VALIDATION = "validation/mean"
DISTANCE = "floor_distance/mean"
COUPLING = ("erc/alpha_1", "erc/vanishing_alpha", "coupling/diagonal_rows", "coupling/noise_bound")
BALANCE = ("router/max_load", "router/dead_experts")
# What Tables 2 and 3 of the paper show.
TABLES = (
    *COUPLING,
    "erc/alpha_2",
    "erc/alpha_3",
    "weights/router_norm",
    "weights/gate_norm",
    *BALANCE,
)


def against_itself(
    config: str,
    overrides: Mapping[str, Any],
    outcome: str,
    seeds: int,
    evaluations: int = EVALUATIONS,
    margin: float = 0.005,
    also: tuple[str, ...] = BALANCE,
) -> Study:
    """The A/A study of a size: a config against itself with other seeds."""
    return Study(
        hypothesis="Arms that differ in their seeds alone do not differ.",
        control="vanilla",
        arms={"vanilla": Arm(config), "again": Arm(config)},
        overrides=overrides,
        is_aa=True,
        seeds=seeds,
        outcome=outcome,
        evaluations=evaluations,
        margin=margin,
        decision="Where the interval excludes 0, no verdict of a study of this size is printed.",
        also=also,
    )
