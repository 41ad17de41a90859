"""The formats of token shards that can be read, by the suffix of the file that holds the tokens."""

from moe_erc.data.shards.base import Format
from moe_erc.data.shards.datatrove import DATATROVE
from moe_erc.data.shards.flat import FLAT
from moe_erc.data.shards.megatron import MEGATRON

FORMATS: dict[str, Format] = {one.suffix: one for one in (FLAT, DATATROVE, MEGATRON)}
