"""What the evaluators of `evaluation/` find on text. All are families.

bits per byte         = loss / ln 2 * tokens / bytes    comparable across tokenizers
distance to the floor = loss - entropy of the source    where the entropy is known
"""

from collections.abc import Mapping
from typing import Any

from moe_erc.measures.base import Measure

MEAN = "mean"  # the member of a family that is the mean of the domains

LOSS = Measure("validation", "validation loss", "nats per token", per_layer=False, better="lower")
BITS = Measure("bits_per_byte", "bits per byte", "", per_layer=False, better="lower")
FLOOR_DISTANCE = Measure(
    "floor_distance", "distance to the floor", "nats per token", per_layer=False, better="lower"
)
UNIGRAM = Measure("unigram", "unigram", "nats per token", per_layer=False)
BIGRAM = Measure("bigram", "bigram", "nats per token", per_layer=False)
TOKENS = Measure("validation_tokens", "tokens", "", per_layer=False, digits=0)
TASK = Measure("tasks", "task", "", per_layer=False)  # by task and metric of the harness
SAMPLE = Measure("sample", "sample", "text", per_layer=False)  # by prompt

MEASURES = (LOSS, BITS, FLOOR_DISTANCE, UNIGRAM, BIGRAM, TOKENS, TASK, SAMPLE)


def domains(found: Mapping[str, Any]) -> list[str]:
    """The names of the domains that were validated on, from measures by key."""
    first = LOSS.key + "/"
    names = [key.removeprefix(first) for key in found if key.startswith(first)]
    return [name for name in names if name != MEAN]
