"""The benchmark's arithmetic, and that methods are built at its sizes; nothing is timed."""

import pytest

from benchmarks import methods
from benchmarks.ours import configure, describe
from moe_erc.model.config import ModelConfig


def model_config(name, shape="peer"):
    return ModelConfig.of(configure(methods.METHODS[name], methods.model_of(shape)))


def test_every_config_of_a_method_is_measured_vanilla_first():
    assert next(iter(methods.METHODS)) == "vanilla"
    assert {"aoe", "erc", "top_p", "erc_mpi"} <= set(methods.METHODS)
    assert methods.METHODS["erc_mpi"] == "combinations.erc_mpi"
    assert not {"base", "sizes", "no_noise"} & set(methods.METHODS)


def test_what_configs_derive_from_sizes_is_derived_from_the_benchmarks():
    assert model_config("vanilla").width == 256
    aoe = model_config("aoe")
    assert aoe.router.gate_rank(aoe) == 256 * 128 // (256 + 128)
    assert model_config("top_p").experts_per_token == 8
    assert model_config("shared_experts").experts_per_token == 3
    assert configure("vanilla", methods.model_of("debug")).model.width == 32
    # All other fields come from tiny.
    assert configure("vanilla", methods.model_of("peer")).model.scan_unroll == 4


def test_aoe_extra_is_what_it_does_more_than_vanilla():
    aoe, vanilla = model_config("aoe"), model_config("vanilla")
    # 3 passes x 2 x (16 - 4) experts x 256 x rank 85 x 4 layers, of one token
    extra = methods.aoe_extra_flops(describe(aoe, 256)["model"], tokens=1)
    assert extra == 3 * 2 * 12 * 256 * 85 * 4
    # The two factors of a chosen expert have the size of a whole gate, less what rounding the rank
    # down saves. There is no router.
    saved = 4 * (256 * 128 - 85 * (256 + 128)) + 16 * 256
    assert (
        3 * (aoe.flops_per_token(256) - vanilla.flops_per_token(256)) == extra - 3 * 2 * 4 * saved
    )


def test_the_expected_step_of_competition_lies_between_its_ends():
    config = model_config("competesmoe")
    share = methods.competing_share(config)
    # Four layers at 0.07 each are 0.28 per step. At most 3 compete, so the 0.07^4 of a fourth is
    # missing.
    assert share == pytest.approx((0.28 - 0.07**4) / 3)
    none, most = ({"step_s": [s], "flops_per_token": f} for s, f in ((1.0, 10), (4.0, 40)))
    expected = methods.between(none, most, share)
    assert expected["step_s"] == [pytest.approx(1 + 3 * share)]
    assert expected["flops_per_token"] == pytest.approx(10 + 30 * share)
    assert none["step_s"] == [1.0]
