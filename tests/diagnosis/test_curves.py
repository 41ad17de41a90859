"""Metrics as they were written, torn lines and repeated steps among them."""

import numpy as np
import pytest

from moe_erc.diagnosis.curves import read_metrics


@pytest.fixture
def written(tmp_path):
    def write(text):
        (tmp_path / "metrics.jsonl").write_bytes(text)
        return tmp_path / "metrics.jsonl"

    return write


def test_numbers_and_vectors_by_step(written):
    text = b"""{"step": 10, "loss/lm": 5.0, "router/max_load": [2.0, 3.0]}
{"step": 20, "loss/lm": 4.0, "router/max_load": [1.5, null]}
{"step": 20, "validation/mean": 4.5}
"""
    metrics = read_metrics(written(text))
    assert list(metrics) == ["loss/lm", "router/max_load", "validation/mean"]
    steps_N, loss_N = metrics["loss/lm"]
    assert steps_N.tolist() == [10, 20] and steps_N.dtype.kind == "i" and loss_N.tolist() == [5, 4]
    np.testing.assert_array_equal(metrics["router/max_load"][1], [[2, 3], [1.5, np.nan]])
    assert [array.tolist() for array in metrics["validation/mean"]] == [[20], [4.5]]


def test_the_last_of_a_step_counts_and_steps_ascend(written):
    text = b'{"step": 2, "a": 2.0, "b": 1.0}\n{"step": 1, "a": 1.0}\n{"step": 2, "a": null}\n'
    metrics = read_metrics(written(text))
    np.testing.assert_array_equal(metrics["a"], ([1, 2], [1, np.nan]))
    np.testing.assert_array_equal(metrics["b"], ([2], [1]))


@pytest.mark.parametrize("torn", [b'{"step": 2, "a', b'{"step"', b"\0\0\xff", b""])
def test_a_torn_last_line_is_left_out(written, torn):
    metrics = read_metrics(written(b'{"step": 1, "a": 1.0}\n' + torn))
    assert {name: steps_N.tolist() for name, (steps_N, _) in metrics.items()} == {"a": [1]}


def test_any_other_line_must_be_json(written):
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 1 is not JSON"):
        read_metrics(written(b'{"step": 1, "a\n{"step": 2, "a": 1.0}\n'))
    assert read_metrics(written(b"")) == {}
