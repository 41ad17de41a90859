"""Attention within documents: a window of several documents against each of them in its own row.

Windows hold what a corpus may bring: documents of one token, ends in a row, a window that begins
with an end, one that is a single document, and documents that neither begin nor end in their
window.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.extend import backend

from configs import base
from moe_erc import sharding
from moe_erc.data.windows import _inputs_and_targets
from moe_erc.losses.objective import Objective
from moe_erc.model import attention
from moe_erc.model.attention import SLICES, attend, attend_by_cudnn, rope, same_segment, uses_cudnn
from moe_erc.model.context import of_batch, packed
from moe_erc.model.transformer import Transformer
from moe_erc.training.state import abstract_state, create_state, initializer
from moe_erc.training.step import step_gradients

EOS, LENGTH = 511, 160  # three slices of queries
# Lengths of the documents of every window, with their ends. The last document goes on behind it.
LENGTHS = (
    (70, 1, 1, 40, 48),
    (1, 100, 59),
    (160,),
    (63, 1, 64, 32),
    (1, 1, 1, 157),
    (159, 1),
    (20, 20, 20, 20, 20, 20, 20, 20),
    (128, 32),
)
ALL = {"experts": 4, "experts_per_token": 4}  # no tie of the router that rounding could decide
# The error of a float32 sum over the tokens of the batch in another order, relative to the largest
# element of its tensor.
TOLERANCE = len(LENGTHS) * LENGTH * 2.0**-24


@pytest.fixture(scope="module")
def windows():
    """The batch of packed windows."""
    window_BT = np.random.default_rng(0).integers(0, EOS, (len(LENGTHS), LENGTH + 1), np.int32)
    for row, lengths in enumerate(LENGTHS):
        window_BT[row, np.cumsum(lengths)[:-1] - 1] = EOS
    window_BT[-1, LENGTH - 1] = EOS  # its target lies behind the window
    return _inputs_and_targets({"tokens": window_BT, "ends": window_BT[:, :-1] == EOS})


@pytest.fixture(scope="module")
def documents(windows):
    """(batch, places) of the documents alone, each in its own padded row.

    A place is the (row, first, length) of a document in the windows.
    """
    places = [
        (row, int(first), length)
        for row, lengths in enumerate(LENGTHS)
        for first, length in zip(np.cumsum((0, *lengths)), lengths, strict=False)
    ]
    alone = {
        name: np.zeros((len(places), LENGTH), windows[name].dtype)
        for name in windows
        if name != "segments_BT"
    }
    for number, (row, first, length) in enumerate(places):
        for name, array_BT in alone.items():
            array_BT[number, :length] = windows[name][row, first : first + length]
    return alone, places


def assert_close(found, expected, tolerance=TOLERANCE):
    """Compares leaf by leaf, relative to the largest element."""

    def compare(found, expected):
        largest = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * largest)

    jax.tree.map(compare, jax.device_get(found), jax.device_get(expected))


@functools.cache
def applier(model):
    @jax.jit
    def hidden_states(params, batch):
        return model.apply(
            {"params": params}, batch["inputs_BT"], batch["mask_BT"], {}, of_batch(batch)
        ).x_BTD

    return hidden_states


@functools.cache
def parameters(config):
    """Large parameters: attention is so sharp that one token more or less in it shows."""
    tokens_BT, rng = jnp.zeros((1, 2), jnp.int32), np.random.default_rng(0)
    shapes = jax.eval_shape(
        Transformer(config).init, jax.random.key(0), tokens_BT, tokens_BT > -1, {}
    )["params"]
    return jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes)


def test_the_fixture_is_what_it_says(windows, documents):
    alone, places = documents
    assert len(places) == sum(map(len, LENGTHS)) and alone["mask_BT"].sum() == len(LENGTHS) * LENGTH
    for row, lengths in enumerate(LENGTHS):
        np.testing.assert_array_equal(
            windows["segments_BT"][row], np.repeat(range(len(lengths)), lengths)
        )
    assert {length for _, _, length in places} >= {1, LENGTH} and windows["inputs_BT"][1, 0] == EOS
    # The end of a document predicts the first token of the next, and is counted.
    assert windows["targets_BT"][1, 0] == windows["inputs_BT"][1, 1] and windows["mask_BT"].all()


@pytest.mark.parametrize(
    "changes", [{}, {"kv_heads": 2, "remat": "block", "scan_unroll": 2}], ids=str
)
def test_hidden_states_are_those_of_the_documents_alone(model_config, windows, documents, changes):
    config = model_config(**ALL, **changes)
    model, params, (alone, places) = Transformer(config), parameters(config), documents
    found, expected = (np.asarray(applier(model)(params, batch)) for batch in (windows, alone))
    together = np.concatenate([found[row, first : first + length] for row, first, length in places])
    assert_close(together, expected[alone["mask_BT"]])
    crossing = applier(model)(params, {name: windows[name] for name in alone})
    assert np.abs(crossing - found)[windows["segments_BT"] > 0].max() > 0.1 * np.abs(found).max()
    first_BT = windows["segments_BT"] == 0
    assert_close(crossing[first_BT], found[first_BT])


def test_bfloat16_too(model_config, windows, documents):
    exact, rounded = (
        Transformer(model_config(dtype=dtype, **ALL)) for dtype in ("float32", "bfloat16")
    )
    params, (alone, places) = parameters(exact.config), documents
    found, expected, in_float32 = (
        np.asarray(applier(model)(params, batch), np.float32)
        for model, batch in ((rounded, windows), (rounded, alone), (exact, alone))
    )
    together = np.concatenate([found[row, first : first + length] for row, first, length in places])
    # XLA leaves out roundings between fused operations, and the two programs fuse different ones.
    # Both are about equally far from float32. Attention to another document would make ten times
    # that difference.
    rounding = np.linalg.norm((expected - in_float32)[alone["mask_BT"]])
    assert (
        np.linalg.norm(together - expected[alone["mask_BT"]])
        < 2 * rounding
        < 0.05 * np.linalg.norm(together)
    )


def test_no_document_knows_the_others(model_config, windows):
    config = model_config(experts_implementation="dense", **ALL)
    apply, params = applier(Transformer(config)), parameters(config)
    of_first_BT = windows["segments_BT"] == 0
    changed = windows | {
        "inputs_BT": np.where(of_first_BT, (windows["inputs_BT"] + 1) % EOS, windows["inputs_BT"])
    }
    before, after = apply(params, windows), apply(params, changed)
    assert (before != after).any(axis=-1)[of_first_BT].all()
    # It is one program that computes row by row, so the others are equal to the bit.
    np.testing.assert_array_equal(before[~of_first_BT], after[~of_first_BT])


def gradients(config, mesh_shape, micro_batches, batch):
    """(gradients, terms) of one step on the language model's loss and the router's."""
    losses = base.get_config("debug").losses.to_dict()
    losses["load_balance"] |= {"weight": 0.0}  # not linear in micro-batches
    losses["router_z"] |= {"weight": 0.1}
    mesh = sharding.make_mesh(*mesh_shape)
    model = Transformer(config, mesh)
    init = initializer(model, optax.sgd(1.0), 0)
    state = create_state(init, abstract_state(init, model), parameters(config))
    of_state = jax.jit(step_gradients(model, Objective(losses, model), micro_batches))
    found, terms, _ = of_state(state, sharding.put_whole_batch(mesh, batch))
    return jax.device_get((found, terms))


@pytest.fixture(scope="module")
def gradients_of_documents(model_config, documents):
    return gradients(model_config(**ALL), (1, 1), 1, documents[0])


@pytest.mark.parametrize(
    "mesh_shape, micro_batches, remat", [((1, 1), 1, "none"), ((2, 2), 2, "block")]
)
def test_loss_and_gradients_are_those_of_the_documents_alone(
    model_config, windows, gradients_of_documents, mesh_shape, micro_batches, remat
):
    found = gradients(model_config(remat=remat, **ALL), mesh_shape, micro_batches, windows)
    assert_close(found, gradients_of_documents)


@pytest.mark.parametrize("time", [3, 5, 4 * SLICES + 3])
def test_segments_are_compared_slice_by_slice(monkeypatch, time):
    monkeypatch.setattr(attention, "SLICE", 4)
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.normal(size=(2, time, heads, 8)).astype(np.float32) for heads in (4, 2, 2)
    )
    segments_BT = np.sort(rng.integers(0, 3, (2, time)))
    mask_BTS = np.tri(time, dtype=bool) & (segments_BT[:, :, None] == segments_BT[:, None])

    def values(function):
        def loss(*of):
            return jnp.sum(jnp.sin(function(*of)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(query, key, value)

    def of_library(*of):
        return jax.nn.dot_product_attention(*of, mask=mask_BTS[:, None], implementation="xla")

    assert_close(
        values(functools.partial(attend, segments_BT=segments_BT)), values(of_library), 1e-5
    )


def test_no_mask_of_a_whole_row_exists(model_config):
    config, T = model_config(), 1024
    tokens_BT, params = jnp.zeros((2, T), jnp.int32), parameters(config)

    def loss(params, segments_BT):
        output = Transformer(config).apply(
            {"params": params}, tokens_BT, tokens_BT > -1, {}, packed(segments_BT)
        )
        return jnp.sum(output.x_BTD)

    text = jax.jit(jax.grad(loss)).lower(params, tokens_BT).as_text()
    # These are the shapes of the last slice.
    assert f"x{T // SLICES}x{T}xi1>" in text and f"x{T // SLICES}x{T}xf32>" in text
    assert f"x{T}x{T}x" not in text


@pytest.fixture
def cudnn_is_there(monkeypatch):
    """Tells jax that cuDNN is there, so that a program can be lowered for it."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)


def lowered_for_cuda(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_cudnn_is_given_the_documents_as_a_mask(model_config, windows, cudnn_is_there, kv_heads):
    config = model_config(
        attention_implementation="cudnn", dtype="bfloat16", kv_heads=kv_heads, layers=1, **ALL
    )
    model, params = Transformer(config), parameters(config)

    def loss(params, batch):
        output = model.apply(
            {"params": params}, batch["inputs_BT"], batch["mask_BT"], {}, of_batch(batch)
        )
        return jnp.sum(output.x_BTD.astype(jnp.float32))

    plain = {name: array for name, array in windows.items() if name != "segments_BT"}
    within, crossing = (
        lowered_for_cuda(jax.grad(loss), params, batch) for batch in (windows, plain)
    )
    for text, kind in ((within, "ScaleBiasSoftmax"), (crossing, "Softmax")):
        for name in (f"@__cudnn$fmha{kind}(", f"@__cudnn$fmha{kind}Backward("):
            assert text.count(name) == 1, name
    causal = r"mask_type\22: \22CAUSAL\22"
    # Later positions are left out of the program, not masked.
    assert within.count(causal) == crossing.count(causal) == 2
    B, scores = len(LENGTHS), f"{LENGTH}x{LENGTH}"
    assert f"tensor<{B}x1x{scores}xbf16>" in within and f"{scores}x" not in crossing


def test_what_cudnn_is_given_is_the_definition(monkeypatch, windows):
    rng, asked = np.random.default_rng(0), {}
    query, key, value = (
        rng.normal(size=(len(LENGTHS), LENGTH, heads, 8)).astype(np.float32) for heads in (4, 2, 2)
    )
    library = jax.nn.dot_product_attention

    def elsewhere(*of, implementation, **options):
        asked["implementation"] = implementation
        return library(*of, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", elsewhere)
    found = attend_by_cudnn(query, key, value, jnp.asarray(windows["segments_BT"]))
    assert asked == {"implementation": "cudnn"}
    assert_close(found, attend(query, key, value, segments_BT=windows["segments_BT"]), 1e-5)


@pytest.mark.parametrize(
    "implementation, length, expected", [("auto", 160, True), ("auto", 161, False)]
)
def test_auto_leaves_masks_of_odd_length_to_the_slices(
    monkeypatch, implementation, length, expected
):
    monkeypatch.setattr(
        backend, "get_backend", lambda: types.SimpleNamespace(platform_version="cuda 12090")
    )
    query, segments_BT = (
        jnp.zeros((1, length, 1, 64), jnp.bfloat16),
        jnp.zeros((1, length), jnp.int32),
    )
    assert uses_cudnn(implementation, query, segments_BT) is expected
    assert uses_cudnn(implementation, query)  # without a mask


def test_positions_restart_by_hand():
    x_BTHD = jnp.tile(jnp.array([1.0, 2.0, 3.0, 4.0]), (1, 5, 1, 1))
    turned = rope(x_BTHD, 100.0, packed(jnp.array([[0, 0, 0, 1, 1]])))
    np.testing.assert_array_equal(turned[0, 3:], turned[0, :2])
    np.testing.assert_array_equal(
        turned, jnp.concatenate([rope(x_BTHD[:, :3], 100.0), rope(x_BTHD[:, :2], 100.0)], 1)
    )


def test_attention_turns_by_positions_that_restart(monkeypatch, model_config):
    # Scores depend only on differences of positions. The first position changes queries and keys,
    # not the output.
    turned = {}

    def keep(query_BTHD, key_BTGD, *_):
        turned["of"] = query_BTHD, key_BTGD
        return query_BTHD

    monkeypatch.setattr(attention, "attend", keep)
    module = attention.Attention(model_config())
    x_BTD = jax.random.normal(jax.random.key(0), (1, 5, module.config.width))
    variables = module.init(jax.random.key(1), x_BTD)

    def of(x_BTD, context=None):
        module.apply(variables, x_BTD, context)
        return turned["of"]

    found = of(x_BTD, packed(jnp.array([[0, 0, 0, 1, 1]])))
    for start, end in ((0, 3), (3, 5)):
        # Roundings: a dot product over D of 32 in another order.
        assert_close(
            [leaf[:, start:end] for leaf in found], list(of(x_BTD[:, start:end])), 32 * 2.0**-24
        )


def test_same_segment_of_slices_by_hand():
    segments_BT = jnp.array([[0, 0, 1, 2]])
    np.testing.assert_array_equal(
        same_segment(segments_BT, slice(1, 3), slice(3)), [[[1, 1, 0], [0, 0, 1]]]
    )
