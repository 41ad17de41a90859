"""Splash attention, interpreted, against the slices: values, gradients, segments, grouped heads."""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc import sharding
from moe_erc.checks import BadInput
from moe_erc.model import splash
from moe_erc.model.attention import Attention, attend
from moe_erc.model.context import packed
from moe_erc.moe import self_test
from tests.tolerance import assert_close

WIDTH = 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Makes several blocks of short sequences."""
    monkeypatch.setattr(splash, "BLOCK", 128)
    monkeypatch.setattr(splash, "AT_ONCE", 128)


def arrays(B, T, kv_heads):
    """(query, key, value, dy, segments) of four heads; a segment may be one token."""
    rng = np.random.default_rng(0)
    operands = []
    for heads in (4, kv_heads, kv_heads, 4):
        operands.append(rng.normal(size=(B, T, heads, WIDTH)).astype(np.float32))
    segments_BT = np.sort(rng.integers(5, size=(B, T)), axis=1)
    segments_BT[:, 1:] += 1  # the first token is a segment of its own
    return *operands, segments_BT


def value_and_gradients(attend, operands, segments_BT):
    *inputs, dy_BTHD = operands
    run = self_test.value_and_gradients(attend)
    return run(inputs, dy_BTHD, segments_BT=segments_BT)


@pytest.mark.parametrize("T, kv_heads, in_segments, block", [
    (40, 2, True, 128),
    (256, 4, False, 128),
    (256, 1, True, 128),
    (300, 2, True, 128),
    # Half of a block's keys at once.
    (300, 2, True, 256),
    (256, 4, False, 256),
])  # fmt: skip
def test_values_and_gradients_are_those_of_the_slices(monkeypatch, T, kv_heads, in_segments, block):
    monkeypatch.setattr(splash, "BLOCK", block)
    *operands, segments_BT = arrays(2, T, kv_heads)
    segments_BT = segments_BT if in_segments else None
    found = value_and_gradients(splash.attend_by_splash, operands, segments_BT)
    expected = value_and_gradients(attend, operands, segments_BT)
    # Roundings: sums over T and over a head's width, forward and backward, and exponentials.
    assert_close(found, expected, 2 * (T + WIDTH) + 16)


def test_every_device_has_its_own_sequences():
    *operands, segments_BT = arrays(4, 130, 2)
    mesh = sharding.make_mesh(2, 2)
    over_mesh = partial(splash.attend_by_splash, mesh=mesh)
    found = value_and_gradients(over_mesh, operands, segments_BT)
    expected = value_and_gradients(attend, operands, segments_BT)
    assert_close(found, expected, 2 * (130 + WIDTH) + 16)


@pytest.mark.parametrize(
    "length, block", [(100, 128), (128, 128), (1100, 640), (1536, 768), (1664, 896), (4096, 1024)]
)
def test_blocks_are_of_one_size_and_hold_the_sequence(monkeypatch, length, block):
    monkeypatch.setattr(splash, "BLOCK", 1024)
    assert splash.block_of(length) == block


def test_the_layer_calls_it_with_its_segments(monkeypatch, model_config):
    monkeypatch.setattr(splash, "refusal", lambda platform, width: None)
    x_BTD = jax.random.normal(jax.random.key(0), (2, 40, model_config().width))
    context = packed(jnp.asarray(arrays(2, 40, 2)[-1]))
    outputs = []
    for name in ("splash", "xla"):
        module = Attention(model_config(attention_implementation=name))
        variables = jax.jit(module.init)(jax.random.key(1), x_BTD)
        outputs.append(jax.jit(module.apply)(variables, x_BTD, context)[0])
    # Four projections over D, scores over a head's width and sums over T.
    assert_close(*outputs, 4 * x_BTD.shape[-1] + 40 + 16)


def test_what_is_right_passes_its_self_test():
    assert splash.refusal("cpu", 16) is None


def test_what_is_wrong_is_refused(monkeypatch):
    right = splash.attend_by_splash

    def across_segments(query, key, value, segments_BT):
        return right(query, key, value)

    monkeypatch.setattr(splash, "attend_by_splash", across_segments)
    assert splash.refusal("cpu", 8) == "its value is wrong"


def queries(dtype=jnp.bfloat16, length=128):
    return jnp.zeros((1, length, 1, 24), dtype)


def test_auto_takes_it_on_a_tpu_and_says_so_once(caplog):
    self_test.say_untimed.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert splash.uses_splash("auto", "tpu", queries())
    assert caplog.messages == ["attention: splash is used on tpu, where it has not been timed"]
    assert not splash.uses_splash("auto", "cpu", queries())
    assert not splash.uses_splash("auto", "tpu", queries(jnp.float32))
    assert not splash.uses_splash("auto", "tpu", queries(length=127))
    assert not splash.uses_splash("xla", "tpu", queries())


def test_slices_are_the_fallback(monkeypatch, caplog):
    monkeypatch.setattr(splash, "refusal", lambda platform, width: "its value is wrong")
    with caplog.at_level(logging.WARNING):
        assert not splash.uses_splash("auto", "tpu", queries())
    assert "splash fails its self-test on tpu, slices are used instead: its value" in caplog.text
    with pytest.raises(BadInput, match=r"'splash' fails its self-test on tpu: .*; use 'auto'"):
        splash.uses_splash("splash", "tpu", queries())
