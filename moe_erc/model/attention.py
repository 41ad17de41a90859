"""Causal self-attention of the OLMoE block.

RMSNorm is applied to queries and keys of the full width, before they are split into heads and
turned by RoPE.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.extend import backend

from moe_erc.model.context import Cache, Context
from moe_erc.model.splash import attend_by_splash, uses_splash
from moe_erc.sharding import platform_of

# Queries of a slice at least, and slices at most: every slice is compiled.
SLICE = 64
SLICES = 8
NOTHING = np.finfo(np.float32).min  # as a score


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) in float32, cast back, times the scale."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def rope(x_BTHD: jax.Array, theta: float, context: Context | None = None) -> jax.Array:
    """Rotary embedding, half-split, of (B, T, H, D).

    Coordinates d and d + D/2 of position t turn by t theta^(-2 d / D). Positions are 0 to T - 1, or
    those of the context.
    """
    positions = x_BTHD.shape[1] if context is None else context.slots
    half = x_BTHD.shape[-1] // 2
    # Constants of the program: as traced values they are computed again for every element they are
    # multiplied with.
    angle_T1D = np.arange(positions)[:, None, None] * theta ** (-np.arange(half) / half)
    sin = np.sin(angle_T1D).astype(np.float32)
    cos = np.cos(angle_T1D).astype(np.float32)
    if context is not None:
        sin = jnp.asarray(sin).at[context.positions_BT].get(mode="fill")
        cos = jnp.asarray(cos).at[context.positions_BT].get(mode="fill")
    first, second = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x_BTHD.dtype)


def uses_cudnn(
    implementation: str, query_BTHD: jax.Array, segments_BT: jax.Array | None = None
) -> bool:
    """Whether cuDNN's fused attention is called.

    It is where `implementation` is "cudnn", and under "auto" on a GPU where it takes these queries.
    """
    if implementation != "auto" or "cuda" not in backend.get_backend().platform_version:
        return implementation == "cudnn"
    length = query_BTHD.shape[1]
    width = query_BTHD.shape[-1]
    # For training it takes no mask of odd length.
    if segments_BT is not None and length % 2:
        return False
    is_half = query_BTHD.dtype in (jnp.bfloat16, jnp.float16)
    return is_half and width % 8 == 0 and width <= 128


def same_segment(
    segments_BT: jax.Array, queries: slice = slice(None), keys: slice = slice(None)
) -> jax.Array:
    """Whether query and key have the same number, (B, T, S) bool, for slices of the row."""
    return segments_BT[:, queries, None] == segments_BT[:, None, keys]


def attend_by_cudnn(
    query_BTHD: jax.Array,
    key_BTGD: jax.Array,
    value_BTGD: jax.Array,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """`attend` by cuDNN's fused kernels.

    Keys ahead of a query are not computed; keys of another segment are masked. The mask of every
    row exists, (T, T) in the dtype of the queries: 34 MB a row at T 4,096 in bfloat16.
    """
    mask = None if segments_BT is None else same_segment(segments_BT)[:, None]
    return jax.nn.dot_product_attention(
        query_BTHD, key_BTGD, value_BTGD, mask=mask, is_causal=True, implementation="cudnn"
    )


def attend(
    query_BTHD: jax.Array,
    key_BSGD: jax.Array,
    value_BSGD: jax.Array,
    attends_BTS: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """softmax(query @ key.T / sqrt(D)) @ value, (B, T, H, D), with scores in float32.

    G key/value heads are shared by H / G query heads each.

    attends_BTS: bool, which query attends to which key. None: to all keys up to its own place.
    segments_BT: where it is given, a query attends only to keys of its own number.

    Queries are taken in slices. Where S is T, a slice meets no key behind its last query, which
    spares up to half of the work. All scores, or all comparisons of segments, never exist at once.
    """
    T = query_BTHD.shape[1]
    G = key_BSGD.shape[2]
    S = key_BSGD.shape[1]
    query_BTGRD = query_BTHD.reshape(*query_BTHD.shape[:2], G, -1, query_BTHD.shape[-1])
    query_BGRTD = jnp.moveaxis(query_BTGRD, 1, 3)
    key_BGSD = jnp.swapaxes(key_BSGD, 1, 2)
    value_BGSD = jnp.swapaxes(value_BSGD, 1, 2)
    if attends_BTS is None:
        attends_BTS = np.tri(T, dtype=bool)[None]
    size = max(SLICE, -(-T // SLICES))
    slices = []
    for start in range(0, T, size):
        of = slice(start, start + size)
        seen = slice(start + size if S == T else S)
        scores = jnp.einsum(
            "bgrtd,bgsd->bgrts",
            query_BGRTD[..., of, :],
            key_BGSD[:, :, seen],
            preferred_element_type=jnp.float32,
        )
        allowed = attends_BTS[:, None, None, of, seen]
        if segments_BT is not None:
            allowed = allowed & same_segment(segments_BT, of, seen)[:, None, None]
        scores = jnp.where(allowed, scores * query_BTHD.shape[-1] ** -0.5, NOTHING)
        weights = jax.nn.softmax(scores, axis=-1).astype(value_BSGD.dtype)
        slices.append(jnp.einsum("bgrts,bgsd->bgrtd", weights, value_BGSD[:, :, seen]))
    y_BGRTD = jnp.concatenate(slices, axis=3)
    return jnp.moveaxis(y_BGRTD, 3, 1).reshape(query_BTHD.shape)


class Attention(nn.Module):
    """(x_BTD, context) -> (y_BTD, cache); groups of query heads share `kv_heads` key/value heads.

    Without a `Context` every token attends to all before it, and the cache is None.
    """

    config: Any  # ModelConfig
    mesh: Any = None

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context | None = None
    ) -> tuple[jax.Array, Cache | None]:
        config = self.config
        init = self.config.initializer
        B, T, D = x_BTD.shape

        def project(name, x, width):
            return x @ self.param(name, init, (x.shape[-1], width)).astype(x.dtype)

        def normalize(name, x):
            scale = self.param(name, nn.initializers.ones, x.shape[-1:])
            return rms_norm(x, scale, config.norm_eps)

        def by_head(x):
            if config.clip_qkv:
                x = jnp.clip(x, -config.clip_qkv, config.clip_qkv)
            return x.reshape(B, T, -1, config.head_width)

        query = normalize("query_norm", project("query", x_BTD, D))
        key = normalize("key_norm", project("key", x_BTD, config.kv_width))
        query = rope(by_head(query), config.rope_theta, context)
        key = rope(by_head(key), config.rope_theta, context)
        value = by_head(project("value", x_BTD, config.kv_width))
        cache = None
        attends_BTS = None
        segments_BT = None
        if context is not None:
            attends_BTS = context.attends_BTS
            segments_BT = context.segments_BT
            if context.cache is not None:
                cache = context.write(key, value)
                key = cache.key_BSHD
                value = cache.value_BSHD
        chosen = config.attention_implementation
        if attends_BTS is None and uses_cudnn(chosen, query, segments_BT):
            y_BTHD = attend_by_cudnn(query, key, value, segments_BT)
        elif attends_BTS is None and uses_splash(chosen, platform_of(self.mesh), query):
            y_BTHD = attend_by_splash(query, key, value, segments_BT, self.mesh)
        else:
            y_BTHD = attend(query, key, value, attends_BTS, segments_BT)
        return project("output", y_BTHD.reshape(B, T, D), D), cache
