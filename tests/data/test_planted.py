"""The planted corpus: a long sample has its entropy, and a bigram model reaches the floor."""

import dataclasses

import numpy as np
import pytest

from moe_erc.checks import BadInput
from moe_erc.data import planted, text
from moe_erc.data.config import DataConfig

# a follows a in 9 of 10 cases, and b follows b in 4 of 5. Two thirds of all letters are a.
STICKY = np.array([[0.9, 0.1], [0.2, 0.8]])


def test_two_letters_by_hand():
    np.testing.assert_allclose(planted.stationary(STICKY), [2 / 3, 1 / 3], atol=1e-12)
    after_a = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    after_b = -(0.2 * np.log(0.2) + 0.8 * np.log(0.8))
    assert planted.entropy_rate(STICKY) == pytest.approx(
        2 / 3 * after_a + 1 / 3 * after_b, rel=1e-12
    )


def pair_counts(text, alphabet):
    states = np.array([planted.LETTERS.index(letter) for letter in text.decode()])
    counts = np.zeros((alphabet, alphabet))
    np.add.at(counts, (states[:-1], states[1:]), 1)
    return counts


def test_the_entropy_rate_is_that_of_a_long_sample():
    source = planted.Planted(regimes=2, alphabet=8, mixing=0.5)
    for chain_AA in source.chains():
        letters = 200_000
        counts = sum(
            pair_counts(text, 8)
            for text in planted.sample(chain_AA, 20, letters // 20, np.random.default_rng(0))
        )
        cost = -np.sum(counts * np.log(np.where(counts > 0, chain_AA, 1))) / counts.sum()
        # The costs of single letters deviate by about one nat. Letters are dependent, so their mean
        # is allowed ten times the standard deviation of independent ones.
        assert cost == pytest.approx(planted.entropy_rate(chain_AA), abs=10 / np.sqrt(letters))


def test_a_bigram_model_reaches_the_floor_where_all_regimes_are_one_chain_and_not_elsewhere():
    for mixing, reaches in ((1.0, True), (0.0, False)):
        source = planted.Planted(
            regimes=4, alphabet=8, mixing=mixing, documents=40, letters=1000, validation=10
        )
        texts = list(source.texts())
        counts = (
            sum(pair_counts(document.text, 8) for document in texts if document.split == "train")
            + 1e-3
        )
        bigram_AA = counts / counts.sum(axis=1, keepdims=True)
        held_out = sum(
            pair_counts(document.text, 8) for document in texts if document.split == "validation"
        )
        cost = -np.sum(held_out * np.log(bigram_AA)) / held_out.sum()
        distance = cost - np.mean(list(source.floor().values()))
        assert (abs(distance) < 0.03) == reaches


def test_documents_are_a_function_of_the_options():
    source = planted.Planted(regimes=3, documents=2, letters=50, validation=1, seed=7)
    texts = list(source.texts())
    assert texts == list(planted.Planted(3, 32, 0.25, 2, 50, 1, 7).texts())
    assert len(texts) == source.count == 9
    assert [document.domain for document in texts] == [
        f"regime_{number}" for number in (0, 0, 0, 1, 1, 1, 2, 2, 2)
    ]
    assert all(len(document.text) == 50 for document in texts)
    assert texts != list(dataclasses.replace(source, seed=8).texts())


def test_the_chains_are_distributions_and_share_what_mixing_says():
    for mixing, same in ((0.0, False), (1.0, True)):
        chains_GAA = planted.Planted(mixing=mixing).chains()
        np.testing.assert_allclose(chains_GAA.sum(axis=-1), 1, atol=1e-12)
        assert np.allclose(chains_GAA[0], chains_GAA[1]) == same


@pytest.mark.parametrize("options, words", [
    ({"regimes": 0}, ["data.planted.regimes: 0", "1 to 64"]),
    ({"mixing": 1.5}, ["data.planted.mixing: 1.5", "0.0 to 1.0"]),
    ({"mixing": float("nan")}, ["mixing: nan"]),
    ({"alphabet": 99}, ["alphabet: 99", "62"]),
])  # fmt: skip
def test_options_that_mean_nothing_are_refused(options, words):
    with pytest.raises(BadInput) as refusal:
        planted.Planted(**options)
    assert all(word in str(refusal.value) for word in words)


def small(config, **changes):
    options = planted.Planted(
        **({"regimes": 2, "documents": 4, "letters": 200, "validation": 1} | changes)
    )
    return dataclasses.replace(config, sources=(planted.NAME,), planted=options)


def test_the_source_is_named_in_a_configuration(config):
    corpus = text.prepare(small(config))
    domains = ["regime_0", "regime_1"]
    assert [list(corpus.streams[split]) for split in ("train", "validation")] == [domains, domains]
    assert len(corpus.streams["train"]["regime_0"].tokens_N) == 4 * 201
    # The options may be a mapping, as they are in a configuration and in a checkpoint.
    again = dataclasses.asdict(small(config))
    assert text.prepare(DataConfig(**again)).identity == corpus.identity
    assert text.prepare(small(config, seed=1)).identity != corpus.identity


def test_the_corpus_knows_the_floor_of_every_domain(config):
    corpus = text.prepare(small(config))
    assert corpus.floors == small(config).planted.floor()
    assert text.reopen(corpus.record, small(config)).floors == corpus.floors
