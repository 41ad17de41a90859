"""The `config.data` block as a value: what text, in which proportions, cut into which tokens."""

import dataclasses

from moe_erc.checks import BadInput, Range, check_fields, in_range, within
from moe_erc.data.planted import Planted
from moe_erc.data.shards import is_pattern
from moe_erc.data.shards.options import TokenOptions

WEIGHT = Range(above=0, note="give each source a share above 0, or drop it")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The sources and options that determine the token streams and their mixture.

    BadInput for a value beyond its limit.
    """

    # "embedded", "planted", a directory, a TFDS name such as "c4/en", or token shards such as
    # "tokens:/data/dolma/*.npy".
    sources: tuple[str, ...]
    weights: tuple[float, ...]  # share of the training windows per source; () is by size
    tokenizer: str  # "bytes" or the path of a Hugging Face tokenizer.json
    text_key: str  # the feature (TFDS) or field (.jsonl) that holds the text
    # Share of the documents that is held out, of a source without a validation split; of token
    # shards the share of every shard.
    validation_fraction: float = within(least=0, below=1, note="0.02 is 2 %")
    sequence_length: int = within(least=1, note="tokens per window")  # T
    cache_dir: str  # "" is $MOE_ERC_CACHE, or ~/.cache/moe_erc
    # Whether tokens attend to earlier documents of their window.
    attend_across_documents: bool = True
    # Of the source "planted"; a mapping is taken as its options.
    planted: Planted = dataclasses.field(default_factory=Planted)
    # Of sources that are token shards; a mapping is taken as its options.
    tokens: TokenOptions = dataclasses.field(default_factory=TokenOptions)

    def __post_init__(self):
        if not isinstance(self.planted, Planted):
            object.__setattr__(self, "planted", Planted(**self.planted))
        if not isinstance(self.tokens, TokenOptions):
            object.__setattr__(self, "tokens", TokenOptions(**self.tokens))
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
        if self.tokens.validation and not any(map(is_pattern, self.sources)):
            raise BadInput(
                f"data.tokens.validation: {self.tokens.validation} is held out of token shards, "
                "and no source is any; name some, as 'tokens:/data/*.npy'"
            )

    def _check_weights(self):
        if self.weights and len(self.weights) != len(self.sources):
            raise BadInput(
                f"data.weights: {len(self.weights)} weights for {len(self.sources)} data.sources; "
                "give one each, or ()"
            )
        for weight in self.weights:
            in_range("data.weights", weight, WEIGHT)
