"""Packed, padded and cached tokens against the plain sequence, which attends to all before."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc import sharding
from moe_erc.model.attention import same_segment
from moe_erc.model.context import branched, cached, empty_cache, of_batch, packed
from moe_erc.model.transformer import Transformer
from moe_erc.training.state import init_weights
from tests import tolerance

CHANGES = {
    "softmax": {},
    "renormalized": {"renormalize": True},
    "top_p": {"top_p": 0.6},
    "bias": {"bias_rate": 1e-3},
    "shared": {"shared_experts": 1},
    "aoe": {"router": "aoe", "rank": 8},
    "competition": {"router": "competition"},
    "mpi": {"router": "mpi"},
    "routing_free": {"router": "routing_free", "rank": 8},
    "sigmoid": {"router": "sigmoid", "bias_rate": 1e-3},
    "xmoe": {"router": "xmoe"},
}
SLOTS, LENGTH, ROWS = 16, 12, 8
FIRST_B = np.array([0, 3, 7, 1, 0, 5, 2, 6])  # slots of padding before each row's sequence


@pytest.fixture(scope="module")
def tokens_BT():
    return np.random.default_rng(0).integers(0, 512, (ROWS, LENGTH), np.int32)


@pytest.fixture(scope="module")
def model_and_weights(model_config):
    @functools.cache
    def make(router="softmax", mesh=None, **changes):
        model, rng = (
            Transformer(model_config(**CHANGES[router], **changes), mesh),
            np.random.default_rng(0),
        )
        one_device = model.clone(mesh=sharding.make_mesh(1, 1))
        shapes = jax.eval_shape(lambda: init_weights(one_device, jax.random.key(0)))
        return model, jax.tree.map(
            lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes
        )

    return make


@functools.cache
def applier(model):
    @jax.jit
    def apply(weights, tokens_BT, context):
        every_BT = jnp.ones_like(tokens_BT, bool)
        output = model.apply(
            {"params": weights.params}, tokens_BT, every_BT, weights.router, context
        )
        return jnp.einsum("btd,vd->btv", output.x_BTD, output.head_VD), output.cache

    return apply


def assert_close(found, expected):
    # Roundings: two layers, each with sums over at most 16 slots and over widths of 32, 32, 16 and
    # 32, and the head's sum over 32.
    tolerance.assert_close(found, expected, terms=2 * (16 + 4 * 32) + 32)


def test_packed_by_hand():
    context = packed(jnp.array([[0, 0, 1, 1, 1, 0]]))
    np.testing.assert_array_equal(context.positions_BT, [[0, 1, 0, 1, 2, 0]])
    assert context.attends_BTS is None and context.slots == 6
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],  # another 0, another sequence
    ]
    np.testing.assert_array_equal(
        np.tri(6, dtype=bool) & same_segment(context.segments_BT)[0], expected
    )


def test_a_batch_has_a_context_if_it_numbers_documents(token_batch):
    batch = token_batch(2, 4)
    assert of_batch(batch) is None  # the plain program, to the bit
    context = of_batch(batch | {"segments_BT": jnp.array([[0, 1, 1, 2], [0, 0, 0, 0]])})
    np.testing.assert_array_equal(context.positions_BT, [[0, 0, 1, 0], [0, 1, 2, 3]])


def test_branched_by_hand():
    positions_BT, trees_BT = jnp.array([[0, 1, 2, 1, 0, 0]]), jnp.array([[1, 1, 1, 1, 2, 0]])
    context = branched(positions_BT, trees_BT, jnp.array([[0, 1, 1, 2, 0, 0]]))
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],  # the trunk and itself, not the first branch
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(context.attends_BTS[0], expected)
    assert context.positions_BT is positions_BT


def test_cached_by_hand(model_config):
    context = cached(empty_cache(model_config(), 2, 5), jnp.array([0, 2]), 3, 1)
    np.testing.assert_array_equal(context.positions_BT, [[3], [1]])
    np.testing.assert_array_equal(context.attends_BTS, [[[1, 1, 1, 1, 0]], [[0, 0, 1, 1, 0]]])


def test_rows_of_one_sequence_are_the_plain_program(model_and_weights, tokens_BT):
    model, weights = model_and_weights()
    one = packed(jnp.ones_like(tokens_BT))
    assert_close(
        applier(model)(weights, tokens_BT, one)[0], applier(model)(weights, tokens_BT, None)[0]
    )


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_packed_sequences_are_the_sequences_alone(model_and_weights, tokens_BT, kv_heads):
    model, weights = model_and_weights(kv_heads=kv_heads)
    found, _ = applier(model)(
        weights, tokens_BT, packed(jnp.tile(jnp.array([4] * 5 + [9] * 6 + [4]), (ROWS, 1)))
    )
    for start, end in ((0, 5), (5, 11), (11, 12)):
        assert_close(found[:, start:end], applier(model)(weights, tokens_BT[:, start:end], None)[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_sequence(model_and_weights, tokens_BT, side):
    model, weights = model_and_weights()
    sequences = [
        slice(first, None) if side == "left" else slice(0, LENGTH - first) for first in FIRST_B
    ]
    inside_BT = np.zeros(tokens_BT.shape, bool)
    for row, sequence in enumerate(sequences):
        inside_BT[row, sequence] = True
    found, _ = applier(model)(weights, tokens_BT, packed(jnp.asarray(inside_BT)))
    assert np.isfinite(found).all()
    for row, sequence in enumerate(sequences):
        assert_close(
            found[row, sequence],
            applier(model)(weights, tokens_BT[row : row + 1, sequence], None)[0][0],
        )


def through_a_cache(model, weights, tokens_BT, prompt):
    """Logits through a cache, each row from its FIRST_B on.

    The first `prompt` tokens are read at once, the others one by one.
    """
    cache, parts = empty_cache(model.config, ROWS, SLOTS), []
    for slot, length in [(0, prompt), *((slot, 1) for slot in range(prompt, LENGTH))]:
        context = cached(cache, jnp.asarray(FIRST_B), jnp.int32(slot), length)
        logits_BTV, cache = applier(model)(weights, tokens_BT[:, slot : slot + length], context)
        parts.append(logits_BTV)
    return np.concatenate(parts, axis=1)


def assert_a_cache_changes_nothing(model, weights, tokens_BT, prompt):
    inside_BT = np.arange(LENGTH) >= FIRST_B[:, None]
    expected, _ = applier(model)(weights, tokens_BT, packed(jnp.asarray(inside_BT)))
    found = through_a_cache(model, weights, tokens_BT, prompt)
    assert_close(found[inside_BT], np.asarray(expected)[inside_BT])
    # Both have the same most probable token, unless two tokens tie.
    best, chosen = np.max(expected, axis=-1), found.argmax(axis=-1)[..., None]
    assert_close(
        np.take_along_axis(np.asarray(expected), chosen, axis=-1)[..., 0][inside_BT],
        best[inside_BT],
    )


@pytest.mark.parametrize("router", CHANGES)
def test_a_cache_changes_nothing_whatever_the_router(model_and_weights, tokens_BT, router):
    assert_a_cache_changes_nothing(*model_and_weights(router), tokens_BT, 1)


@pytest.mark.parametrize("prompt", [4, 11])
def test_a_cache_changes_nothing_wherever_the_prompt_ends(model_and_weights, tokens_BT, prompt):
    assert_a_cache_changes_nothing(*model_and_weights(kv_heads=1, clip_qkv=0.5), tokens_BT, prompt)


def test_a_cache_changes_nothing_on_a_mesh(model_and_weights, tokens_BT):
    (oracle, weights), (model, _) = (
        model_and_weights(),
        model_and_weights(mesh=sharding.make_mesh(2, 4)),
    )
    expected, found = (through_a_cache(one, weights, tokens_BT, 8) for one in (oracle, model))
    assert_close(found, expected)


def test_queries_keys_and_values_are_clipped(model_and_weights, tokens_BT):
    (model, weights), (clipped, _) = model_and_weights(), model_and_weights(clip_qkv=0.5)
    (_, cache), (_, within) = (
        applier(one)(
            weights,
            tokens_BT,
            cached(empty_cache(one.config, ROWS, SLOTS), jnp.asarray(FIRST_B), 0, LENGTH),
        )
        for one in (model, clipped)
    )
    assert np.abs(within.value_BSHD).max() == 0.5 < np.abs(cache.value_BSHD).max()
    # Clipping comes before RoPE, which turns pairs. So no pair is longer than the diagonal.
    diagonal = 0.5 * 2**0.5 * (1 + tolerance.within(4))
    assert 0.5 < np.abs(within.key_BSHD).max() <= diagonal < np.abs(cache.key_BSHD).max()
