"""How exactly ERC's matmuls are computed, and what share of a step that takes.

    share = passes * (3 E + 2) 2 L E D F * matrices / (3 * FLOPs of a token's forward pass * tokens)

A TPU multiplies bfloat16. In one pass ("default") M shifts by 4e-4 and the loss by 5e-4. Three
passes ("high") give all but the last bits of float32, six ("highest") give all of them. A GPU may
take TF32 where one pass is asked for. A CPU computes float32 always. The 3 are the products of all
rows with an expert and their two gradients, the 2 the product of its own row and one gradient, as
in the compiled program, with every hinge active. `matrices` is how many of an expert's matrices the
activation reads.
"""

from typing import Any

from moe_erc.losses.responses import MATRICES

PRECISIONS = ("default", "high", "highest")
PASSES = 3  # of "high"
LARGEST_SHARE = 0.0005  # the largest share of a step that "auto" spends on "high"


def erc_flops(config: Any, activation: str) -> int:
    """FLOPs of ERC's matmuls, forward and backward, in one pass, on all devices together.

    config: the model's.
    """
    matrices = len(MATRICES[activation])
    products = config.layers * config.experts * (3 * config.experts + 2)
    return 2 * products * config.width * config.expert_width * matrices


def erc_share(config: Any, activation: str, shape_BT: tuple[int, int]) -> float:
    """The share of an optimizer step's FLOPs that ERC takes at "high".

    shape_BT: (sequences, length) of the step's batch.
    """
    batch, length = shape_BT
    step_flops = 3 * config.flops_per_token(length) * batch * length
    return PASSES * erc_flops(config, activation) / step_flops


def resolve(precision: str, config: Any, activation: str, shape_BT: tuple[int, int] | None) -> str:
    """The precision that "auto" stands for; another precision stands for itself.

    "auto" is "high" where that takes less than 0.05 % of the step, and where no step is known. Else
    it is "default".
    """
    if precision != "auto":
        return precision
    if shape_BT is None or erc_share(config, activation, shape_BT) < LARGEST_SHARE:
        return "high"
    return "default"
