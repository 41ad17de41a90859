"""A corpus with known answers: documents of several regimes.

Each regime is a Markov chain of its own over one alphabet:

    chain_g = (1 - mixing) private_g + mixing shared        rows drawn from a Dirichlet distribution

A document is drawn from one regime, from its stationary distribution on. Its domain is its regime,
so that the regime of every token is known. The entropy of the source is known exactly: no model can
have a lower loss than `floor`. At mixing 0 the chains share nothing. At mixing 1 all regimes are
the same chain, and a bigram model reaches the floor. Everything is a function of the options:
nothing is downloaded.
"""

import dataclasses
import string
from collections.abc import Iterator

import numpy as np

from moe_erc.checks import check_fields, within
from moe_erc.data.document import Document

NAME = "planted"
LETTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits
CONCENTRATION = 0.1  # of the Dirichlet rows: from most letters a few others are likely


@dataclasses.dataclass(frozen=True)
class Planted:
    """The options of the source, the block `data.planted` of a configuration."""

    regimes: int = within(1, 64, default=8)  # G
    alphabet: int = within(2, len(LETTERS), default=32)  # letters, A
    mixing: float = within(0.0, 1.0, default=0.25)  # share of the chain that all have in common
    documents: int = within(1, 10**6, default=64)  # of each regime, for training
    letters: int = within(2, 10**6, default=4096)  # of a document
    validation: int = within(1, 10**5, default=4)  # documents of each regime that are held out
    seed: int = within(0, 2**32 - 1, default=0)

    def __post_init__(self):
        check_fields(self, f"data.{NAME}")

    def chains(self) -> np.ndarray:
        """(G, A, A) float64: the probability of a letter after a letter, by regime."""
        rng = np.random.default_rng([self.seed, 0])
        rows = np.full(self.alphabet, CONCENTRATION)
        shared_AA = rng.dirichlet(rows, self.alphabet)
        private_GAA = rng.dirichlet(rows, (self.regimes, self.alphabet))
        return (1 - self.mixing) * private_GAA + self.mixing * shared_AA

    def floor(self) -> dict[str, float]:
        """{regime: nats per token} that no model can go below.

        It is the entropy of the source, given the regime.

        The end of a document, one token, is predictable from its length and adds nothing.
        """
        floors = {}
        for number, chain_AA in enumerate(self.chains()):
            first = _entropy(stationary(chain_AA))
            others = (self.letters - 1) * entropy_rate(chain_AA)
            floors[_regime(number)] = (first + others) / (self.letters + 1)
        return floors

    def texts(self) -> Iterator[Document]:
        """Every document, by regime and split."""
        for number, chain_AA in enumerate(self.chains()):
            rng = np.random.default_rng([self.seed, 1, number])
            for split, count in (("train", self.documents), ("validation", self.validation)):
                for text in sample(chain_AA, count, self.letters, rng):
                    yield Document(split, _regime(number), text)

    @property
    def count(self) -> int:
        """The number of documents."""
        return self.regimes * (self.documents + self.validation)


def stationary(chain_AA: np.ndarray) -> np.ndarray:
    """(A,): the share of every letter in a long document; the chain has to be irreducible."""
    letters = len(chain_AA)
    # The left eigenvector of eigenvalue 1, as the solution of an overdetermined system with sum 1.
    system = np.vstack([chain_AA.T - np.eye(letters), np.ones(letters)])
    target = np.append(np.zeros(letters), 1.0)
    share_A = np.linalg.lstsq(system, target, rcond=None)[0]
    share_A = np.maximum(share_A, 0)
    return share_A / share_A.sum()


def entropy_rate(chain_AA: np.ndarray) -> float:
    """Nats per letter of a long document.

    It is the mean entropy of a row, weighted by the stationary distribution.
    """
    return float(
        sum(
            share * _entropy(row_A)
            for share, row_A in zip(stationary(chain_AA), chain_AA, strict=True)
        )
    )


def sample(
    chain_AA: np.ndarray, documents: int, letters: int, rng: np.random.Generator
) -> list[bytes]:
    """Documents of the chain, each begun in its stationary distribution."""
    cumulative_AA = np.cumsum(chain_AA, axis=1)
    last = len(chain_AA) - 1  # a cumulative sum may end a rounding below 1
    states_ND = np.empty((letters, documents), np.int64)
    states_ND[0] = np.minimum(
        np.searchsorted(np.cumsum(stationary(chain_AA)), rng.random(documents)), last
    )
    for position in range(1, letters):
        below_DA = cumulative_AA[states_ND[position - 1]] < rng.random(documents)[:, None]
        states_ND[position] = np.minimum(below_DA.sum(axis=1), last)
    alphabet = np.frombuffer(LETTERS.encode(), np.uint8)
    return [alphabet[states_N].tobytes() for states_N in states_ND.T]


def _entropy(share_A):
    positive = share_A[share_A > 0]
    return float(-np.sum(positive * np.log(positive)))


def _regime(number):
    return f"regime_{number}"
