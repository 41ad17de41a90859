"""Between tiny and small, for one GPU: 6 layers, D 384, F 192, E 64, K 8."""

from moe_erc.study.plan import Arm, Study
from studies import settings


def get_study() -> Study:
    """The study."""
    return Study(
        hypothesis="ERC and MPI lower the validation loss of a model of 15 M active parameters.",
        control="vanilla",
        arms={
            "vanilla": Arm("configs/vanilla.py:small"),
            "erc": Arm("configs/erc.py:small"),
            "mpi": Arm("configs/mpi.py:small"),
        },
        overrides={
            **settings.TINY,
            "data.sequence_length": 512,
            "model.layers": 6,
            "model.width": 384,
            "model.heads": 6,
            "model.kv_heads": 6,
            "model.expert_width": 192,
            "model.vocab_size": 512,
            "model.remat": "none",
            "train.batch_size": 64,
            "train.micro_batches": 1,
            "train.steps": 2_000,
            "eval.every": 100,
            "eval.batch_size": 64,
            "eval.report_windows": 512,
            "optimizer.warmup_steps": 100,
            "log.every": 50,
            "checkpoint.every": 1_000,
        },
        seeds=5,
        first_seed=100000,
        outcome=settings.VALIDATION,
        evaluations=settings.TINY_EVALUATIONS,
        margin=0.005,
        decision="The README says whether a gain in loss is visible at this size.",
        also=(*settings.COUPLING, *settings.BALANCE),
    )
