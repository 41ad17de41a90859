"""Norm and rotation by hand; attention against the definition, head by head in NumPy."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import backend

from moe_erc.model import attention
from moe_erc.model.attention import SLICES, Attention, attend, rms_norm, rope, uses_cudnn
from tests.tolerance import assert_close


def test_rms_norm_by_hand():
    # rms of (3, 4) is sqrt(12.5)
    found = rms_norm(jnp.array([3.0, 4.0]), jnp.array([1.0, 2.0]), 0.0)
    assert_close(found, [3 / 12.5**0.5, 8 / 12.5**0.5], terms=8)


def test_rope_by_hand():
    # Of width 4, coordinates (0, 2) turn by t and (1, 3) by t / sqrt(theta), with theta 100 t / 10.
    x_BTHD = jnp.tile(jnp.array([1.0, 2.0, 3.0, 4.0]), (1, 3, 1, 1))
    t = 2.0
    expected = [
        1 * np.cos(t) - 3 * np.sin(t), 2 * np.cos(t / 10) - 4 * np.sin(t / 10),
        3 * np.cos(t) + 1 * np.sin(t), 4 * np.cos(t / 10) + 2 * np.sin(t / 10),
    ]  # fmt: skip
    turned = rope(x_BTHD, 100.0)
    assert_close(turned[0, 0, 0], [1, 2, 3, 4], terms=4)
    assert_close(turned[0, 2, 0], expected, terms=8)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_is_the_definition(model_config, kv_heads):
    config = model_config(heads=4, kv_heads=kv_heads)
    B, T, D, width = 2, 7, config.width, config.head_width
    module, x_BTD = Attention(config), jax.random.normal(jax.random.key(0), (B, T, D))
    params = jax.tree.map(
        lambda leaf: leaf + jax.random.normal(jax.random.key(leaf.size), leaf.shape),
        module.init(jax.random.key(1), x_BTD),
    )["params"]

    def heads(name, count, turned):
        y = x_BTD @ params[name]
        if turned:
            y = rms_norm(y, params[f"{name}_norm"], config.norm_eps)
        y = y.reshape(B, T, count, width)
        return np.asarray(rope(y, config.rope_theta) if turned else y)

    query, key, value = (
        heads("query", 4, True),
        heads("key", kv_heads, True),
        heads("value", kv_heads, False),
    )
    expected = np.zeros((B, T, 4, width))
    for b in range(B):
        for h in range(4):
            for t in range(T):
                shared = h * kv_heads // 4
                scores = key[b, : t + 1, shared] @ query[b, t, h] / width**0.5
                weights = np.exp(scores - scores.max())
                expected[b, t, h] = weights / weights.sum() @ value[b, : t + 1, shared]
    expected = expected.reshape(B, T, D) @ params["output"]
    found_BTD, cache = module.apply({"params": params}, x_BTD)
    # Roundings, D for each: two projections over D, scores over a head's width with an exponential,
    # and a sum over T.
    assert_close(found_BTD, expected, terms=4 * D)
    assert cache is None


@pytest.mark.parametrize("time", [3, 5, 4 * SLICES + 3])
def test_slices_of_queries_make_no_difference(monkeypatch, time):
    monkeypatch.setattr(attention, "SLICE", 4)
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.normal(size=(1, time, heads, 8)).astype(np.float32) for heads in (4, 2, 2)
    )

    def gradients(function):
        def loss(*of):
            return jnp.sum(jnp.sin(function(*of)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(query, key, value)

    expected = gradients(
        lambda *of: jax.nn.dot_product_attention(*of, is_causal=True, implementation="xla")
    )
    blocked_BTS = np.tri(time, dtype=bool)[None] & (np.arange(time) != 2) | np.eye(time, dtype=bool)
    # Roundings: sums over `time` and over 8 coordinates, forward and backward. The loss adds
    # 4 * 8 * time sines.
    assert_close(gradients(attend), expected, terms=32 * time)
    masked = jax.nn.dot_product_attention(
        query, key, value, mask=blocked_BTS[:, None], implementation="xla"
    )
    sliced = jax.jit(lambda *of: attend(*of))
    assert_close(sliced(query, key, value, blocked_BTS), masked, terms=8 + time)


@pytest.mark.parametrize("implementation, platform, dtype, width, expected", [
    ("auto", "cuda 12090", jnp.bfloat16, 64, True),
    ("auto", "cuda 12090", jnp.float32, 64, False),
    ("auto", "cuda 12090", jnp.bfloat16, 132, False),
    ("auto", "cuda 12090", jnp.bfloat16, 36, False),
    ("auto", "rocm 7.0", jnp.bfloat16, 64, False),
    ("xla", "cuda 12090", jnp.bfloat16, 64, False),
    ("cudnn", "cuda 12090", jnp.float32, 64, True),  # refused by cuDNN, in its own words
])  # fmt: skip
def test_cudnn_is_chosen_where_it_takes_what_is_there(
    monkeypatch, implementation, platform, dtype, width, expected
):
    monkeypatch.setattr(
        backend, "get_backend", lambda: types.SimpleNamespace(platform_version=platform)
    )
    assert uses_cudnn(implementation, jnp.zeros((1, 2, 1, width), dtype)) is expected
