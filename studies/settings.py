"""What several studies have in common: arms, and the settings of their runs."""

from moe_erc.study.plan import Arm

# A model of 0.2 M parameters on the planted corpus, whose entropy is known: a run takes less than a
# minute on one core. No text is drawn at evaluations, and few windows are read.
SMALL = {
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
    "eval.prompt": "",
    "log.every": 50,
    "log.tensorboard": False,
    "checkpoint.every": 200,
}

# The same model on shorter alphabets, trained until the slope of its loss is small. Then runs that
# differ in their seeds alone lie close together: docs/studies.md has the settings that were tried.
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
TINY = {
    "train.steps": 1200,
    "eval.every": 40,
    "eval.windows": 16,
    "eval.prompt": "",
    "log.tensorboard": False,
}

# The size `tiny` with as many experts as the paper has, each a quarter as wide.
EXPERTS_64 = {
    **TINY,
    "model.experts": 64,
    "model.experts_per_token": 8,
    "model.expert_width": 16,
}

# The size `mini` on one GPU, whose windows of validation are scored in few batches.
MINI = {
    "eval.prompt": "",
    "log.tensorboard": False,
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
