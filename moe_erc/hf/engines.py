"""What vLLM and llama.cpp hard-code of the released OLMoE, and how an export meets it.

Both ignore four entries of config.json and compute with the values of the release:

    rms_norm_eps: 1e-5, norm_topk_prob: false, clip_qkv: null, tie_word_embeddings: false

The first and the last are met without changing the model. A tied head is written out. An epsilon is
folded into the weights: with c = sqrt(1e-5 / eps)

    x / sqrt(mean(x^2) + eps)  =  c x / sqrt(mean((c x)^2) + 1e-5)

so that everything that adds to a normed vector is multiplied by c. Those are the embedding and the
outputs of attention and experts for the norms of the block, and the projections of queries and keys
for their own norms. The other two entries are no linear maps and stay; `differences` names them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_erc.model.config import ModelConfig

EPS = 1e-5
BY_TOKEN = ("embed", "head")
BY_KV_HEAD = ("layers.attention.key", "layers.attention.key_norm", "layers.attention.value")
NORMED = (
    "embed",
    "layers.attention.query",
    "layers.attention.key",
    "layers.attention.output",
    "layers.moe.w_down",
)


class Export(NamedTuple):
    """A model as it is written: `change(path, array)` gives the array in place of a leaf."""

    config: ModelConfig
    leaves: dict[str, jax.Array]  # by path of `olmoe_names.TABLE`
    change: Callable[[str, jax.Array], jax.Array]

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The leaves as they are written, abstract."""

        def change_all(leaves):
            return {path: self.change(path, leaf) for path, leaf in leaves.items()}

        return jax.eval_shape(change_all, self.leaves)


def config_for_engines(
    config: ModelConfig, tokens: int | None = None, repeat_kv_heads: bool = False
) -> ModelConfig:
    """The configuration of the model that `for_engines` writes, with `tokens` rows."""
    return replace(
        config,
        norm_eps=EPS,
        tie_embeddings=False,
        kv_heads=config.heads if repeat_kv_heads else config.kv_heads,
        vocab_size=tokens or config.vocab_size,
    )


def for_engines(
    config: ModelConfig,
    leaves: Mapping[str, jax.Array],
    rows: Sequence[int] | None = None,
    repeat_kv_heads: bool = False,
) -> Export:
    """The model that engines with the values of the release compute as the given one.

    Args:
      config: of a model with a softmax router
      leaves: {path: parameter}
      rows: for every token id the row of embedding and head that it has; None: all rows as they are
      repeat_kv_heads: write every key and value head once per query head that reads it, which
        changes no number. The norm of the keys stays, because a mean of repeated squares is theirs.
    """
    written = config_for_engines(config, None if rows is None else len(rows), repeat_kv_heads)
    repeats = written.kv_heads // config.kv_heads
    scale = math.sqrt(EPS / config.norm_eps)

    def change(path, array):
        if rows is not None and path in BY_TOKEN:
            array = array[np.asarray(rows)]
        if repeats > 1 and path in BY_KV_HEAD:
            heads = array.reshape(*array.shape[:-1], config.kv_heads, config.head_width)
            array = jnp.repeat(heads, repeats, axis=-2).reshape(*array.shape[:-1], config.width)
        return array * scale if path in NORMED else array

    leaves = dict(leaves)
    # A tied head is the embedding before it is multiplied.
    leaves.setdefault("head", leaves["embed"])
    return Export(written, leaves, change)


class Difference(NamedTuple):
    """What an engine makes of an option of the model that it does not know."""

    option: str  # with its value, as the configuration spells it
    engines: str
    consequence: str

    def __str__(self) -> str:
        return f"{self.option}: {self.engines} {self.consequence}"


def differences(config: ModelConfig) -> list[Difference]:
    """Where another engine computes another model than the one of `config_for_engines`, or none.

    Raises:
      BadInput: for a router that cannot be exported.
    """
    renormalize = config.router.exports_as().renormalize
    found = []
    if config.clip_qkv:
        found.append(
            Difference(
                f"model.clip_qkv {config.clip_qkv:g}",
                "vLLM and llama.cpp",
                "do not clip queries, keys and values, and answer other text",
            )
        )
    # With all experts chosen the weights sum to 1 as they are.
    if renormalize and config.experts_per_token < config.experts:
        found.append(
            Difference(
                f"{config.router.key('renormalize')} True",
                "vLLM and llama.cpp",
                "do not divide the weights of the chosen experts by their sum, "
                "and answer other text",
            )
        )
    if config.kv_heads < config.heads:
        found.append(
            Difference(
                f"model.kv_heads {config.kv_heads} for {config.heads} heads",
                "llama.cpp",
                "does not load the model; --repeat_kv_heads writes one that it loads",
            )
        )
    return found
