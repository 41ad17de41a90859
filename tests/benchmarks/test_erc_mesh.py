"""The benchmark's shares, by the formula of its docstring."""

import pytest

from benchmarks import erc_mesh
from configs import base


def test_the_share_does_not_depend_on_the_mesh():
    config = base.get_config("debug")
    tokens = config.train.batch_size * config.data.sequence_length
    for mesh in ((8, 1), (2, 4)):
        row = erc_mesh.measure("debug", 8, 4, mesh)
        # E = 4, K = 2: E^2 / 3 expert tokens against K N, over all devices alike
        assert row["share_of_experts"] == pytest.approx(4**2 / 3 / (2 * tokens))
        # every rank: E (E / ep) / 3 against K N / dp
        assert row["paper_share"] == pytest.approx(4 * 1 / 3 / (2 * tokens / 8))
        assert row["forward_flops"] < row["step_flops"] and row["wire_bytes"] > 0
