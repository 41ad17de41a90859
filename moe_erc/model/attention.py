"""Causal self-attention of the OLMoE block: RMSNorm on full-width queries and keys, then heads, then RoPE."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.extend import backend

from moe_erc.model.context import Cache, Context

SLICE = 64
SLICES = 8  # queries of a slice at least, and slices at most: every one is compiled
NOTHING = np.finfo(np.float32).min  # as a score


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) in float32, cast back, times the scale."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def rope(x_BTHD: jax.Array, theta: float, context: Context | None = None) -> jax.Array:
    """Rotary embedding, half-split: coordinates d and d + D/2 of position t turn by t theta^(-2 d / D)."""
    positions = x_BTHD.shape[1] if context is None else context.slots
    half = x_BTHD.shape[-1] // 2
    # Constants of the program: as traced values they are computed again for every element they are
    # multiplied with.
    angle_T1D = np.arange(positions)[:, None, None] * theta ** (-np.arange(half) / half)
    sin = np.sin(angle_T1D).astype(np.float32)
    cos = np.cos(angle_T1D).astype(np.float32)
    if context is not None:
        sin, cos = (jnp.asarray(of).at[context.positions_BT].get(mode="fill") for of in (sin, cos))
    first, second = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x_BTHD.dtype)


def uses_cudnn(
    implementation: str, query_BTHD: jax.Array, segments_BT: jax.Array | None = None
) -> bool:
    """Whether cuDNN's fused attention is called: where it was asked for, and by "auto" where it takes what is there."""
    if implementation != "auto" or "cuda" not in backend.get_backend().platform_version:
        return implementation == "cudnn"
    length = query_BTHD.shape[1]
    width = query_BTHD.shape[-1]
    if segments_BT is not None and length % 2:  # it takes no mask of odd length for training
        return False
    return query_BTHD.dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= 128


def same_segment(
    segments_BT: jax.Array, queries: slice = slice(None), keys: slice = slice(None)
) -> jax.Array:
    """(B, T, S) bool, of slices of the row: whether query and key have one number."""
    return segments_BT[:, queries, None] == segments_BT[:, None, keys]


def attend_by_cudnn(
    query_BTHD: jax.Array,
    key_BTGD: jax.Array,
    value_BTGD: jax.Array,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """As `attend`, in cuDNN's fused kernels: what lies ahead is not computed, what lies in another segment is masked.

    The mask of every row exists, (T, T) in the dtype of the queries: 34 MB a row at T 4,096 in
    bfloat16.
    """
    mask = None if segments_BT is None else same_segment(segments_BT)[:, None]
    of = query_BTHD, key_BTGD, value_BTGD
    return jax.nn.dot_product_attention(*of, mask=mask, is_causal=True, implementation="cudnn")


def attend(
    query_BTHD: jax.Array,
    key_BSGD: jax.Array,
    value_BSGD: jax.Array,
    attends_BTS: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """softmax(query @ key.T / sqrt(D)) @ value, (B, T, H, D): heads H / G share keys; float32 scores.

    Without `attends_BTS` to all that is not behind, of these with `segments_BT` to those of the
    same number. Queries go by slices, and where S is T a slice meets no key behind its last query:
    up to half of the work is spared, and never all scores exist at once, nor all comparisons of
    segments.
    """
    T = query_BTHD.shape[1]
    G = key_BSGD.shape[2]
    S = key_BSGD.shape[1]
    query_BGRTD = jnp.moveaxis(
        query_BTHD.reshape(*query_BTHD.shape[:2], G, -1, query_BTHD.shape[-1]), 1, 3
    )
    key_BGSD, value_BGSD = (jnp.swapaxes(leaf, 1, 2) for leaf in (key_BSGD, value_BSGD))
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
        weights = jax.nn.softmax(
            jnp.where(allowed, scores * query_BTHD.shape[-1] ** -0.5, NOTHING), axis=-1
        )
        slices.append(
            jnp.einsum(
                "bgrts,bgsd->bgrtd", weights.astype(value_BSGD.dtype), value_BGSD[:, :, seen]
            )
        )
    return jnp.moveaxis(jnp.concatenate(slices, axis=3), 3, 1).reshape(query_BTHD.shape)


class Attention(nn.Module):
    """x_BTD -> (y_BTD, cache), with `kv_heads` key/value heads shared by groups of query heads.

    Without a `Context` every token attends to all before it, and there is no cache.
    """

    config: Any  # ModelConfig

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
            return rms_norm(
                x, self.param(name, nn.initializers.ones, x.shape[-1:]), config.norm_eps
            )

        query = normalize("query_norm", project("query", x_BTD, D))
        key = normalize("key_norm", project("key", x_BTD, config.kv_width))
        value = project("value", x_BTD, config.kv_width)
        if config.clip_qkv:
            query, key, value = (
                jnp.clip(leaf, -config.clip_qkv, config.clip_qkv) for leaf in (query, key, value)
            )
        query, key, value = (
            leaf.reshape(B, T, -1, config.head_width) for leaf in (query, key, value)
        )
        query, key = (rope(leaf, config.rope_theta, context) for leaf in (query, key))
        cache = None
        if context is not None and context.cache is not None:
            key, value = cache = context.write(key, value)
        attends_BTS, segments_BT = (
            (None, None) if context is None else (context.attends_BTS, context.segments_BT)
        )
        if attends_BTS is None and uses_cudnn(config.attention_implementation, query, segments_BT):
            y_BTHD = attend_by_cudnn(query, key, value, segments_BT)
        else:
            y_BTHD = attend(query, key, value, attends_BTS, segments_BT)
        return project("output", y_BTHD.reshape(B, T, D), D), cache
