"""Sizes of models: four for tests and small machines, and the published ones.

debug runs in seconds, for tests; tiny takes minutes on a CPU and mini on a GPU; small fits one GPU.

Parameters in millions, with `D` width, `F` expert width, `A = 2 D^2 + 2 D D_kv` attention, `V`
50,304, embedding and head apart:

                 layers x (A     + experts E 3 D F + norms, router) + 2 V D = all       active
    olmoe_1b_7b  16     x (16.8  + 402.7           + 0.1          ) + 206.0 = 6.92B     1.28B
    3b           12     x (9.4   + 226.5           + 0.1          ) + 154.5 = 2.99B     0.61B
    15b          24     x (10.5  + 604.0           + 0.5          ) + 206.0 = 14.97B    0.92B

The ERC paper counts 0.5B (3b) and 0.7B (15b) active parameters, as these do without embeddings. It
does not state F and the key/value heads of its 15B: 384 and 4 give both totals. It trains on 500B
tokens in batches of 3M.
"""

from ml_collections import ConfigDict

from moe_erc.checks import one_of

MODELS = {
    #              layers width heads kv experts K  expert_width vocab
    "debug": (2, 32, 2, 1, 4, 2, 16, 512),
    "tiny": (4, 128, 4, 4, 16, 4, 64, 512),
    "mini": (6, 384, 6, 6, 64, 8, 192, 512),
    "small": (8, 512, 8, 8, 64, 8, 256, 50304),
    "olmoe_1b_7b": (16, 2048, 16, 16, 64, 8, 1024, 50304),
    "3b": (12, 1536, 16, 16, 64, 8, 768, 50304),
    "15b": (24, 2048, 16, 4, 256, 8, 384, 50304),
}
MODEL_FIELDS = (
    "layers",
    "width",
    "heads",
    "kv_heads",
    "experts",
    "experts_per_token",
    "expert_width",
    "vocab_size",
)

# Meshes and micro-batches of the published models are those of 64 chips of v5p (4x4x4). Those of
# other slices are in docs/parallelism.md.
RUNS = {
    #              T   batch micro steps  lr  warmup dtype  remat  (data, expert) mesh
    "debug": (32, 8, 1, 6, 3e-3, 2, "float32", "none", (1, -1)),
    "tiny": (256, 8, 1, 600, 3e-3, 30, "float32", "none", (1, -1)),
    "mini": (512, 64, 1, 2_000, 1e-3, 100, "bfloat16", "none", (-1, 1)),
    "small": (1024, 64, 2, 20_000, 1e-3, 500, "bfloat16", "block", (-1, 1)),
    "olmoe_1b_7b": (4096, 1024, 1, 1_200_000, 4e-4, 2_000, "bfloat16", "block", (-1, 1)),
    "3b": (4096, 768, 1, 159_000, 4e-4, 2_000, "bfloat16", "block", (-1, 1)),
    "15b": (4096, 768, 1, 159_000, 4e-4, 2_000, "bfloat16", "block", (-1, 1)),
}
# steps between logs, evaluations and checkpoints; validation windows of each domain: then, and at
# the end
CADENCE = {
    "debug": (1, 3, 3, 4, 8),
    "tiny": (10, 100, 100, 16, 128),
    "mini": (50, 100, 1_000, 16, 512),
}
LARGE_CADENCE = (10, 1_000, 1_000, 256, 0)


def apply(config: ConfigDict, size: str) -> None:
    """Sets the fields of one size; an unknown one is refused by name."""
    one_of("--config: size", size, MODELS)
    for field, value in zip(MODEL_FIELDS, MODELS[size], strict=True):
        config.model[field] = value
    length, batch_size, micro_batches, steps, learning_rate, warmup_steps, dtype, remat, mesh = (
        RUNS[size]
    )
    config.data.sequence_length = length
    config.train.update(batch_size=batch_size, micro_batches=micro_batches, steps=steps)
    config.optimizer.update(learning_rate=learning_rate, warmup_steps=warmup_steps)
    config.model.update(dtype=dtype, remat=remat, scan_unroll=4 if size == "tiny" else 1)
    config.mesh.data, config.mesh.expert = mesh
    log, evaluation, checkpoint, windows, report_windows = CADENCE.get(size, LARGE_CADENCE)
    config.log.every = log
    config.checkpoint.every = checkpoint
    config.eval.update(
        every=evaluation,
        windows=windows,
        report_windows=report_windows,
        batch_size=batch_size // micro_batches,
    )
