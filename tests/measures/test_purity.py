"""Purity of routing, by hand."""

import numpy as np
import pytest

from moe_erc.measures.purity import purity


def test_every_domain_has_an_expert_of_its_own():
    assert purity([[[7, 0]], [[0, 2]]]) == pytest.approx(1)


def test_all_domains_use_the_experts_alike():
    assert purity([[[30, 10]], [[3, 1]]]) == pytest.approx(0, abs=1e-12)


def test_two_domains_and_three_experts_by_hand():
    # The first domain has expert 0 alone, the second one the others: H(expert) = 1.5 log 2,
    # H(domain) = log 2 and the expert tells the domain, so I = log 2.
    assert purity([[[4, 0, 0]], [[0, 5, 5]]]) == pytest.approx(2 / 2.5)


def test_layers_are_apart_and_a_layer_of_one_expert_tells_nothing():
    found_L = purity([[[1, 0], [5, 0], [0, 0]], [[0, 1], [5, 0], [0, 0]]])
    np.testing.assert_allclose(found_L, [1, 0, 0], atol=1e-12)


def test_a_single_domain_tells_nothing():
    assert purity([[[3, 4]]]) == pytest.approx(0)
