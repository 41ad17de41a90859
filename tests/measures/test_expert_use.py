"""Shares of experts worked by hand."""

import numpy as np
import pytest

from moe_erc.measures.expert_use import coactivation, domain_divergence, expert_shares, token_specialization
from tests.tolerance import assert_close


def test_divergence_of_domains_by_hand():
    apart, alike = [[6, 2, 0, 0], [0, 0, 5, 5]], [[1, 2, 3, 4], [10, 20, 30, 40]]
    # p = (3/4, 1/4), q = (1/4, 3/4), mean (1/2, 1/2): 1 bit less H(1/4) = 1/4 * 2 + 3/4 * log2(4/3) = 0.811278
    opposed = [[3, 1, 0, 0], [1, 3, 0, 0]]
    # p = (1, 0), q = (1/2, 1/2), mean (3/4, 1/4): 0.811278 less (0 + 1) / 2
    nested = [[7, 0, 0, 0], [7, 7, 0, 0]]
    load_GLE = np.swapaxes([apart, alike, opposed, nested], 0, 1)
    assert np.abs(domain_divergence(load_GLE) - [1, 0, 1 - 0.811278, 0.311278]).max() < 1e-6  # as many digits


@pytest.mark.parametrize("domains", [1, 3, 8])
def test_divergence_reaches_log2_of_the_domains(domains):
    assert domain_divergence(np.eye(domains)[:, None]) == pytest.approx([np.log2(domains)])


def test_a_domain_without_load_in_a_layer_has_no_divergence_there():
    load_GLE = [[[1, 1], [1, 1]], [[0, 0], [1, 1]]]
    np.testing.assert_array_equal(domain_divergence(load_GLE), [np.nan, 0])
    np.testing.assert_array_equal(expert_shares([2, 6]), [0.25, 0.75])


def test_token_specialization_by_hand():
    # Two experts a token. Id 0 occurs 4 times, 3 of them at expert 0; id 1 twice, at experts 1 and 2; id 2 never:
    # (3 + 2) / 6, where a mean over ids would be (3/4 + 1) / 2.
    counts_VE = [[3, 2, 2, 1], [0, 2, 2, 0], [0, 0, 0, 0]]
    # Even use: K / E = 2 / 4.
    even_VE = [[2, 2, 2, 2], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert_close(token_specialization([counts_VE, even_VE], [4, 2, 0]), [5 / 6, 1 / 2], terms=4)


def test_coactivation_by_hand():
    # Three tokens choose experts {0, 1}, {0, 1}, {0, 2}; nobody chooses expert 3.
    pairs_EE = [[3, 2, 1, 0], [2, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    expected_EE = [[1, 2 / 3, 1 / 3, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert_close(coactivation([pairs_EE]), [expected_EE], terms=4)
