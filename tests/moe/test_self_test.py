"""The self-test at start-up: right matmuls pass, each kind of wrong ones is refused."""

import logging

import jax
import jax.numpy as jnp
import pytest

from moe_erc.moe import experts, self_test
from moe_erc.moe.grouped_matmul import grouped_matmul


def with_empty_groups(value):
    """A matmul whose gradient of an empty group's matrix is `value`."""

    @jax.custom_vjp
    def matmul(x_MD, w_EDF, sizes_E):
        return grouped_matmul(x_MD, w_EDF, sizes_E)

    def forward(*inputs):
        return grouped_matmul(*inputs), inputs

    def backward(inputs, dy_MF):
        dx_MD, dw_EDF, _ = jax.vjp(grouped_matmul, *inputs)[1](dy_MF)
        return dx_MD, jnp.where(inputs[2][:, None, None] > 0, dw_EDF, value), None

    matmul.defvjp(forward, backward)
    return matmul


def drops_single_rows(x_MD, w_EDF, sizes_E):
    return grouped_matmul(x_MD, w_EDF, jnp.where(sizes_E == 1, 0, sizes_E))


def multiplies_rows_of_nobody(x_MD, w_EDF, sizes_E):
    return grouped_matmul(x_MD, w_EDF, sizes_E.at[-1].add(len(x_MD) - jnp.sum(sizes_E)))


def leaves_rows_of_nobody_unwritten(x_MD, w_EDF, sizes_E):
    is_inside_M = jnp.arange(len(x_MD)) < jnp.sum(sizes_E)
    return jnp.where(is_inside_M[:, None], grouped_matmul(x_MD, w_EDF, sizes_E), jnp.nan)


def stops_the_gradient_of_rows(x_MD, w_EDF, sizes_E):
    return grouped_matmul(jax.lax.stop_gradient(x_MD), w_EDF, sizes_E)


def does_not_compile(x_MD, w_EDF, sizes_E):
    raise NotImplementedError("no such chip\nand more")


@pytest.mark.parametrize("name", ["ragged", "megablox", "pallas"])
def test_what_is_right_passes(name):
    assert self_test.refusal(experts.MATMULS[name], "cpu") is None


def test_rows_behind_the_last_group_may_hold_anything():
    assert self_test.refusal(leaves_rows_of_nobody_unwritten, "cpu") is None


@pytest.mark.parametrize("matmul, words", [
    (with_empty_groups(jnp.nan), "gradient of the matrices is wrong"),
    (with_empty_groups(1e-3), "gradient of the matrices is not zero where a group is empty"),
    (drops_single_rows, "value is wrong"),
    (multiplies_rows_of_nobody, "gradient of the matrices is wrong"),
    (stops_the_gradient_of_rows, "gradient of the rows is wrong"),
    (does_not_compile, "NotImplementedError: no such chip"),
])  # fmt: skip
def test_what_is_wrong_is_refused_in_one_line(matmul, words):
    refusal = self_test.refusal(matmul, "cpu")
    assert refusal.endswith(words)


def test_it_may_be_asked_while_a_model_is_traced():
    asked = []

    def twice(x_MD, w_EDF, sizes_E):
        return 2 * grouped_matmul(x_MD, w_EDF, sizes_E)

    @jax.jit
    def model(x):
        asked.append(self_test.refusal(twice, "cpu"))
        return x

    jax.grad(lambda x: jax.checkpoint(model)(x))(1.0)
    assert asked == ["its value is wrong"]


def test_a_device_that_is_not_there_is_not_asked():
    assert self_test.refusal(does_not_compile, "no such platform") is None


def test_auto_falls_back_to_the_portable_loop_and_says_so(monkeypatch, caplog):
    monkeypatch.setitem(experts.FASTEST, "cpu", ("pallas", "block_loop"))
    monkeypatch.setitem(experts.MATMULS, "pallas", drops_single_rows)
    with caplog.at_level(logging.WARNING):
        assert experts.implementation("auto", "cpu") is experts.IMPLEMENTATIONS["block_loop"]
    assert (
        "pallas fails its self-test on cpu, block_loop is used instead: its value is wrong"
        in caplog.text
    )


def test_auto_takes_the_next_fastest_that_passes(monkeypatch, caplog):
    monkeypatch.setitem(experts.FASTEST, "cpu", ("pallas", "ragged", "block_loop"))
    monkeypatch.setitem(experts.MATMULS, "pallas", drops_single_rows)
    with caplog.at_level(logging.WARNING):
        assert experts.implementation("auto", "cpu") is experts.IMPLEMENTATIONS["ragged"]
    assert "pallas fails its self-test on cpu, ragged is used instead" in caplog.text


def test_what_was_never_timed_is_said_once(caplog):
    self_test.say_untimed.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            experts.implementation("auto", "tpu")
            experts.implementation("ragged", "tpu")
    assert caplog.messages == ["experts: megablox is used on tpu, where it has not been timed"]


def test_a_name_that_was_given_is_refused_rather_than_replaced(monkeypatch):
    monkeypatch.setitem(experts.MATMULS, "pallas", drops_single_rows)
    with pytest.raises(
        ValueError, match="'pallas' fails its self-test on cpu: its value is wrong; use 'auto'"
    ):
        experts.implementation("pallas", "cpu")
