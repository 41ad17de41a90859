"""The `config.data` block as a value: what text, in which proportions, cut into which tokens."""

import dataclasses
import math

from moe_erc.checks import BadInput


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Everything that determines the token streams and how they are mixed; checked where it is made."""

    sources: tuple[str, ...]  # "embedded", a directory, or a TFDS name such as "c4/en"
    weights: tuple[float, ...]  # share of the training windows per source; () is proportional to size
    tokenizer: str  # "bytes" or the path of a Hugging Face tokenizer.json
    text_key: str  # the feature (TFDS) or field (.jsonl) that holds the text
    validation_fraction: float  # share of the documents held out of a source that has no validation split
    sequence_length: int  # T, predicted tokens per window
    cache_dir: str  # "" is $MOE_ERC_CACHE, or ~/.cache/moe_erc
    attend_across_documents: bool = True  # tokens attend to earlier documents of their window; as runs did without it

    def __post_init__(self):
        if isinstance(self.sources, str) or not self.sources:
            raise BadInput(
                f"data.sources: {self.sources!r} is not a list of sources; give at least one, such as ('embedded',)"
            )
        for source in self.sources:
            if not isinstance(source, str):
                raise BadInput(f"data.sources: {source!r} is no text; give names in quotes, such as ('embedded',)")
            if not source or self.sources.count(source) > 1:
                raise BadInput(
                    f"data.sources: {source!r} is empty or listed twice in {tuple(self.sources)}; list it once"
                )
        if self.weights and len(self.weights) != len(self.sources):
            raise BadInput(
                f"data.weights: {len(self.weights)} weights for {len(self.sources)} data.sources; give one each, or ()"
            )
        for weight in self.weights:
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise BadInput(f"data.weights: {weight!r} is no number; give one per source, such as (0.7, 0.3)")
        if any(not 0 < weight < math.inf for weight in self.weights):
            raise BadInput(f"data.weights: {tuple(self.weights)} must all be above 0; drop the source to leave it out")
        if not 0 <= self.validation_fraction < 1:
            raise BadInput(f"data.validation_fraction: {self.validation_fraction} is not in [0, 1); give 0.02 for 2 %")
        if self.sequence_length < 1:
            raise BadInput(
                f"data.sequence_length: {self.sequence_length} is below 1; give the tokens per window, such as 256"
            )
