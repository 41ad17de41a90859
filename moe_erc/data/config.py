"""The `config.data` block as a value: what text, in which proportions, cut into which tokens."""

import dataclasses

from moe_erc.checks import BadInput, Range, check_fields, in_range, within
from moe_erc.data.planted import Planted

WEIGHT = Range(above=0, note="give each source a share above 0, or drop it")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The sources and options that determine the token streams and their mixture.

    BadInput for a value beyond its limit.
    """

    sources: tuple[str, ...]  # "embedded", "planted", a directory, or a TFDS name such as "c4/en"
    weights: tuple[float, ...]  # share of the training windows per source; () is by size
    tokenizer: str  # "bytes" or the path of a Hugging Face tokenizer.json
    text_key: str  # the feature (TFDS) or field (.jsonl) that holds the text
    # Share of the documents that is held out, of a source without a validation split.
    validation_fraction: float = within(least=0, below=1, note="0.02 is 2 %")
    sequence_length: int = within(least=1, note="tokens per window")  # T
    cache_dir: str  # "" is $MOE_ERC_CACHE, or ~/.cache/moe_erc
    # Whether tokens attend to earlier documents of their window.
    attend_across_documents: bool = True
    # Of the source "planted"; a mapping is taken as its options.
    planted: Planted = dataclasses.field(default_factory=Planted)

    def __post_init__(self):
        if not isinstance(self.planted, Planted):
            object.__setattr__(self, "planted", Planted(**self.planted))
        check_fields(self, "data")
        self._check_sources()
        self._check_weights()

    def _check_sources(self):
        if isinstance(self.sources, str) or not self.sources:
            raise BadInput(
                f"data.sources: {self.sources!r} is not a list of sources; "
                "give at least one, such as ('embedded',)"
            )
        for source in self.sources:
            if not isinstance(source, str):
                raise BadInput(
                    f"data.sources: {source!r} is no text; give names in quotes, as ('embedded',)"
                )
            if not source or self.sources.count(source) > 1:
                listed = tuple(self.sources)
                raise BadInput(
                    f"data.sources: {source!r} is empty or listed twice in {listed}; list it once"
                )

    def _check_weights(self):
        if self.weights and len(self.weights) != len(self.sources):
            raise BadInput(
                f"data.weights: {len(self.weights)} weights for {len(self.sources)} data.sources; "
                "give one each, or ()"
            )
        for weight in self.weights:
            in_range("data.weights", weight, WEIGHT)
