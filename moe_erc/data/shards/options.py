"""The `config.data.tokens` block: what the formats of token shards do not say."""

import dataclasses
import re

from moe_erc.checks import BadInput, among, check_fields
from moe_erc.data.shards import is_pattern


@dataclasses.dataclass(frozen=True)
class TokenOptions:
    """The options of sources that are token shards. BadInput for a value beyond its limit."""

    # Of a token, where a format does not say it; "" is uint16 if the tokenizer's ids fit, else
    # uint32.
    dtype: str = among("", "uint16", "uint32", default="")
    # The id of the token that ends a document; "" is what the index of the shards says, else the
    # end-of-document token of data.tokenizer.
    end_of_document: str = ""
    # The name that shards give to the tokenizer of data.tokenizer, if it is not its path.
    tokenizer: str = ""
    # Patterns of the shards that are held out; () holds out the end of every shard.
    validation: tuple[str, ...] = ()

    def __post_init__(self):
        check_fields(self, "data.tokens")
        if self.end_of_document and not re.fullmatch("[0-9]{1,10}", self.end_of_document):
            raise BadInput(
                f"data.tokens.end_of_document: {self.end_of_document!r} is no token id; "
                "give a number such as 50279, or ''"
            )
        if isinstance(self.validation, str):
            raise BadInput(
                f"data.tokens.validation: {self.validation!r} is not a list of patterns; "
                f"write it as ('{self.validation}',)"
            )
        for pattern in self.validation:
            if not isinstance(pattern, str) or is_pattern(pattern):
                raise BadInput(
                    f"data.tokens.validation: {pattern!r} is no pattern of files; "
                    "write it as '/data/val/*.npy', without 'tokens:'"
                )
