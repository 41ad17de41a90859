"""Counting by hand."""

import types

import numpy as np
import pytest

from moe_erc.evaluation.ngram import ngram_losses


def test_unigram_and_bigram_by_hand():
    # train 0 1 0 1 1: pairs 01 10 01 11; counted as seconds: one 0, three 1; as firsts: 0 twice, 1 twice; V = 2
    # u(0) = 2/6, u(1) = 4/6;  p(1|0) = (2 + 4/6)/3, p(0|1) = (1 + 2/6)/3, p(0|0) = (0 + 2/6)/3
    # validation 0 0 1 0: pairs 00 01 10
    stream = lambda *ids: types.SimpleNamespace(tokens_N=np.array(ids, np.uint16))  # noqa: E731
    corpus = types.SimpleNamespace(
        tokenizer=types.SimpleNamespace(vocab_size=2),
        streams={"train": {"a": stream(0, 1, 0, 1, 1)}, "validation": {"b": stream(0, 0, 1, 0)}},
    )
    losses = ngram_losses(corpus)
    assert losses["unigram/b"] == losses["unigram/mean"] == pytest.approx(-np.log([2 / 6, 4 / 6, 2 / 6]).mean())
    assert losses["bigram/b"] == pytest.approx(-np.log([2 / 18, 8 / 9, 4 / 9]).mean())
