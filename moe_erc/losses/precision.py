"""How exactly ERC's matmuls are computed, and what that costs of a step.

    share = passes * 4 * 2 L E^2 D F * matrices / (3 * FLOPs of a token's forward pass * tokens)

A TPU multiplies bfloat16. In one pass ("default") M shifts by 4e-4 and the loss by 5e-4; three passes ("high") give
all but the last bits of float32, six ("highest") all of them. A GPU may take TF32 where one pass is asked for; a CPU
computes float32 always. The 4 are forward, its recomputation and two gradients, as in the compiled program, with every
hinge active. `matrices` is how many of an expert's matrices the activation reads.
"""

from typing import Any

from moe_erc.losses.responses import RESPONSES

PRECISIONS = ("default", "high", "highest")
PASSES = 3  # of "high"
LARGEST_SHARE = 0.0005  # of a step, that "auto" spends on "high"


def erc_flops(config: Any, activation: str) -> int:
    """Of the matmuls of ERC, forward and backward, in one pass, on all devices together; `config` is the model's."""
    matrices = len(RESPONSES[activation][1])
    return 4 * 2 * config.layers * config.experts**2 * config.width * config.expert_width * matrices


def erc_share(config: Any, activation: str, shape_BT: tuple[int, int]) -> float:
    """What ERC at "high" has of an optimizer step on so many sequences of such a length, as a share of its FLOPs."""
    batch, length = shape_BT
    step_flops = 3 * config.flops_per_token(length) * batch * length
    return PASSES * erc_flops(config, activation) / step_flops


def resolve(precision: str, config: Any, activation: str, shape_BT: tuple[int, int] | None) -> str:
    """What "auto" is: "high" while its share of the step is below 0.05 %, or where no step is known; else "default"."""
    if precision != "auto":
        return precision
    if shape_BT is None or erc_share(config, activation, shape_BT) < LARGEST_SHARE:
        return "high"
    return "default"
