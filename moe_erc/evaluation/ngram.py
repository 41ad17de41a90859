"""Baselines that only count: unigram and bigram models of the training streams.

    unigram  u(b)     = (count(b) + 1) / (N + V)
    bigram   p(b | a) = (count(a b) + u(b)) / (count(a) + 1)

They are scored on the validation streams. The bigram is interpolated, so that an unseen pair has a
probability above 0. A language model that has not beaten the bigram has learnt no context.
"""

import numpy as np
import scipy.sparse

from moe_erc.data.text import Corpus
from moe_erc.measures.validation import BIGRAM, MEAN, UNIGRAM

MOST_TOKENS = 20_000_000  # that are counted of each domain


def ngram_losses(corpus: Corpus) -> dict[str, float]:
    """The losses of both models on every validation domain, and their means, by key.

    The counts are of all training domains together.
    """
    vocabulary = corpus.tokenizer.vocab_size
    pairs_VV = 0
    for stream in corpus.streams["train"].values():
        pairs_VV = pairs_VV + _pairs(stream.tokens_N[:MOST_TOKENS], vocabulary)
    count_V = np.asarray(pairs_VV.sum(axis=0)).ravel()
    before_V = np.asarray(pairs_VV.sum(axis=1)).ravel()
    unigram_V = (count_V + 1) / (count_V.sum() + vocabulary)
    found = {}
    for domain, stream in corpus.streams["validation"].items():
        seen = _pairs(stream.tokens_N[:MOST_TOKENS], vocabulary).tocoo()
        before = seen.row
        after = seen.col
        times = seen.data
        count = np.asarray(pairs_VV[before, after]).ravel()
        bigram = (count + unigram_V[after]) / (before_V[before] + 1)
        found[UNIGRAM.of(domain).key] = float(-times @ np.log(unigram_V[after]) / times.sum())
        found[BIGRAM.of(domain).key] = float(-times @ np.log(bigram) / times.sum())
    for measure in (UNIGRAM, BIGRAM):
        losses = [found[measure.of(domain).key] for domain in corpus.streams["validation"]]
        found[measure.of(MEAN).key] = float(np.mean(losses))
    return found


def _pairs(tokens_N, vocabulary):
    """How often token b follows token a, as a sparse (V, V) matrix."""
    ids_N = np.asarray(tokens_N, np.int32)
    ones_N = np.ones(len(ids_N) - 1, np.int64)
    places = (ids_N[:-1], ids_N[1:])
    return scipy.sparse.coo_array((ones_N, places), shape=(vocabulary, vocabulary)).tocsr()
