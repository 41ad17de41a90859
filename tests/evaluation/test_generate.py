"""Generated text against the model's logits: several prompts, any mesh, drawn and greedy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc import sharding
from moe_erc.data.tokenizer import ByteTokenizer
from moe_erc.evaluation.generate import Generator, Sampling
from moe_erc.model.transformer import Transformer
from moe_erc.training.state import Weights, init_weights
from tests.tolerance import assert_decided

PROMPTS = ["the rou", "d", "sends every token to the ex", "", "what it"]
LENGTH = 64


class Latin(ByteTokenizer):
    """A tokenizer whose ids are characters, so that a text shows its tokens."""

    def decode(self, ids):
        return bytes(token for token in ids if token < 256).decode("latin-1")

    def encode(self, text):
        return np.frombuffer(text.encode("latin-1"), np.uint8)


@functools.cache
def weights_of(config):
    shapes = jax.eval_shape(
        lambda: init_weights(Transformer(config, sharding.make_mesh(1, 1)), jax.random.key(0))
    )
    rng = np.random.default_rng(0)
    return Weights(
        jax.tree.map(
            lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes.params
        ),
        {},
    )


@functools.cache
def generator_of(config, data, expert):
    return Generator(
        Transformer(config, sharding.make_mesh(data, expert)), Latin(), largest_context=LENGTH
    )


@pytest.fixture
def run(model_config):
    def run(prompts, mesh=(1, 1), changes=(), **sampling):
        config = model_config(**dict(changes))
        return generator_of(config, *mesh).run(
            weights_of(config), prompts, Sampling(**{"new_tokens": 20} | sampling)
        )

    return run


@functools.cache
def jitted_logits(config):
    @jax.jit
    def logits(params, tokens_BT):
        output = Transformer(config).apply(
            {"params": params}, tokens_BT, jnp.ones_like(tokens_BT, bool), {}
        )
        return jnp.einsum("btd,vd->btv", output.x_BTD, output.head_VD)[0, :, : Latin.vocab_size]

    return logits


def logits_after(config, ids):
    """Logits of the next token, without a cache.

    The model is causal, so one padded shape serves all lengths.
    """
    tokens_BT = np.zeros((1, LENGTH), np.int32)
    tokens_BT[0, : len(ids)] = ids
    return np.asarray(jitted_logits(config)(weights_of(config).params, tokens_BT)[len(ids) - 1])


def greedy(config, prompt, new_tokens=20):
    ids, written = list(Latin().encode(prompt)) or [Latin.eos_id], []
    while len(written) < new_tokens:
        logits_V = logits_after(config, ids + written)
        # If rounding could decide, a mesh might write another text. Two layers have sums over 32.
        assert_decided(logits_V, terms=2 * 5 * 32)
        if (token := int(logits_V.argmax())) == Latin.eos_id:
            break
        written.append(token)
    return Latin().decode(written)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)])
def test_greedy_is_the_argmax_of_the_whole_context_every_time(run, model_config, mesh):
    expected = [greedy(model_config(), prompt) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    assert run(PROMPTS, mesh) == expected
    assert [run([prompt], mesh)[0] for prompt in PROMPTS[:3]] == expected[:3]


def test_nothing_is_continued_by_nothing(run):
    assert run([]) == []


def test_a_draw_depends_on_the_seed_and_on_the_row_and_on_nothing_else(run):
    drawn = {"temperature": 1.0, "seed": 3}
    texts = run(PROMPTS, **drawn)
    assert run(PROMPTS, **drawn) == run(PROMPTS, (2, 4), **drawn) == texts
    assert run(PROMPTS[:2], **drawn) == texts[:2]  # other buckets, other neighbours
    assert all(a != b for a, b in zip(run(PROMPTS, **drawn | {"seed": 4}), texts, strict=True))
    assert len(set(run([PROMPTS[0]] * 4, **drawn))) == 4
    assert run(PROMPTS, **drawn, top_k=1) == run(PROMPTS)


def test_tokens_are_drawn_from_the_models_distribution(run, model_config):
    rows, temperature = 2048, 0.5
    share_V = np.asarray(
        jax.nn.softmax(logits_after(model_config(), list(b"the rou")) / temperature)
    )
    texts = run(["the rou"] * rows, temperature=temperature, new_tokens=1)
    ids = [Latin().encode(text)[0] if text else Latin.eos_id for text in texts]
    found_V = np.bincount(ids, minlength=Latin.vocab_size) / rows
    assert share_V.max() < 0.9 and (share_V > 0.01).sum() > 3  # there is something to draw
    assert (np.abs(found_V - share_V) < 5 * np.sqrt(share_V / rows) + 1e-3).all()


def test_stops_end_a_row_and_leave_the_others(run):
    whole = run(PROMPTS)
    text, token = whole[0][5:7], whole[1][3]
    expected = [one.split(token)[0] for one in whole]
    assert run(PROMPTS, stop=(int(Latin().encode(token)[0]),)) == expected != whole
    assert run(PROMPTS, stop=(text,)) == [one.split(text)[0] for one in whole] != whole


def test_no_token_is_computed_when_all_rows_are_done(run, model_config, monkeypatch):
    (whole,), generator = run(["the rou"]), generator_of(model_config(), 1, 1)
    decode, written = generator._decode, []

    def watched(*inputs):
        cache, tokens_BS = decode(*inputs)
        written.append(tokens_BS[0, len("the rou") :].tolist())
        return cache, tokens_BS

    monkeypatch.setattr(generator, "_decode", watched)
    (text,) = run(["the rou"], stop=(ord(whole[3]),))
    ids = [*Latin().encode(text), ord(whole[3])]
    assert written == [ids + [0] * (len(written[0]) - len(ids))]


def test_the_end_of_text_token_ends_a_row(model_config):
    config = model_config()
    weights = weights_of(config)
    head_VD = weights.params["head"].copy()
    greedy_id = int(logits_after(config, list(b"the rou")).argmax())
    head_VD[Latin.eos_id] = 2 * head_VD[greedy_id]
    weights = Weights(weights.params | {"head": head_VD}, {})
    assert generator_of(config, 1, 1).run(weights, ["the rou"], Sampling(new_tokens=5)) == [""]


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0}, {"stop": ("th",), "temperature": 2.0}]
)
def test_a_stream_is_the_same_text_in_pieces(run, model_config, sampling):
    config = model_config()
    pieces = list(
        generator_of(config, 1, 1).stream(weights_of(config), "the rou", Sampling(20, **sampling))
    )
    assert "".join(pieces) == run(["the rou"], **sampling)[0] and len(pieces) > 5 and all(pieces)


def test_a_prompt_that_does_not_fit_is_refused(run):
    with pytest.raises(ValueError, match="prompt: 50 tokens and 20 new ones are more than the 64"):
        run(["x" * 50])


def test_few_programs_serve_many_lengths_and_samplings(run, model_config):
    generator = generator_of(model_config(), 2, 1)
    for length in (17, 20, 24):
        for sampling in (
            {},
            {"temperature": 0.7, "top_k": 5, "seed": length},
            {"top_p": 0.9, "stop": ("a", 3)},
        ):
            run(["x" * length, "y"], (2, 1), **sampling)
    assert generator._prefill._cache_size() == generator._decode._cache_size() == 1


def test_a_model_with_what_routing_carries(model_config):
    config = model_config(bias_rate=1e-3)
    params = weights_of(config).params
    biased, plain = (
        {"bias": jnp.tile(jnp.array(row), (2, 1))} for row in ([0, 9.0, 0, 9], [0.0, 0, 0, 0])
    )
    generator = generator_of(config, 1, 1)
    one, other = (
        generator.run(Weights(params, router), ["the"], Sampling(8)) for router in (biased, plain)
    )
    assert one != other
