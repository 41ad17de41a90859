"""What a training step, its guard and its clock find beside the loads of experts."""

from moe_erc.measures.base import Measure

# A family: one for every loss.
LOSS = Measure("loss", "loss", "unweighted", per_layer=False, better="lower")
LM = Measure("loss/lm", "training loss", "nats per token", per_layer=False, better="lower")
TOTAL = Measure("loss/total", "total loss", "weighted", per_layer=False, better="lower")
# A family: of a loss whose weight a controller moves.
SCALE = Measure("scale", "factor of the weight", "", per_layer=False)
GRADIENT_NORM = Measure("norm/gradient", "gradient norm", "", per_layer=False)
PARAMETER_NORM = Measure("norm/parameters", "parameter norm", "", per_layer=False)
LEARNING_RATE = Measure("optimizer/learning_rate", "learning rate", "", per_layer=False)
ZSCORE = Measure(
    "guard/zscore", "loss above its recent mean", "standard deviations", per_layer=False
)
SKIPPED = Measure("guard/skipped", "steps skipped", "", per_layer=False)
IN_A_ROW = Measure("guard/skipped_in_a_row", "steps skipped in a row", "", per_layer=False)
TOKENS_PER_S = Measure(
    "speed/tokens_per_s", "tokens per second", "", per_layer=False, better="higher", digits=0
)
MFU = Measure(
    "speed/mfu", "model FLOPs utilisation", "share of the peak", per_layer=False, better="higher"
)

MEASURES = (
    LOSS, LM, TOTAL, SCALE, GRADIENT_NORM, PARAMETER_NORM, LEARNING_RATE,
    ZSCORE, SKIPPED, IN_A_ROW, TOKENS_PER_S, MFU,
)  # fmt: skip
