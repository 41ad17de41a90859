"""The work of kernels, read from calls as libtpu 0.0.50 writes them (jax 0.12.0)."""

import pathlib

import pytest

from benchmarks.compiled import costs, hlo, kernels

PROGRAM = (pathlib.Path(__file__).parent / "programs" / "kernels.hlo").read_text()
SCORES = 2 * 2 * 16 * 4096**2 * 128  # FLOPs of one matmul of attention, all scores
ROWS = 2 * 65536 * 2048 * 1024


@pytest.fixture(scope="module")
def found():
    read = {}
    for instruction in hlo.parse(PROGRAM).instructions:
        if instruction.opcode == "custom-call":
            read[instruction.name] = kernels.read(instruction)
    return read


@pytest.mark.parametrize("name, matmuls", [
    ("splash_mha_fwd_residuals.1", 2),
    ("splash_mha_dq_no_residuals.1", 3),
    ("splash_mha_dkv_no_residuals.1", 4),
])  # fmt: skip
def test_attention_computes_the_tiles_on_and_below_the_diagonal(found, name, matmuls):
    # Of 4 x 4 tiles 1 + 2 + 3 + 4 are needed, and half of the scores.
    expected = (kernels.ATTENTION, matmuls * SCORES // 2, matmuls * SCORES * 10 / 16)
    assert found[name] == expected


@pytest.mark.parametrize("name", ["jvp_jit_gmm__.2", "transpose_jvp_jit_tgmm___.2"])
def test_a_tile_of_rows_that_two_groups_share_is_computed_for_both(found, name):
    # 128 tiles of 512 rows; each of 63 boundaries between 64 groups lies inside one.
    assert found[name] == (kernels.GROUPED, ROWS, ROWS * 191 / 128)


def test_the_last_tile_of_columns_is_computed_whole(found):
    # Tiles of 640 columns: two of them, 1,280 columns, for 1,024.
    expected = (kernels.GROUPED, ROWS, ROWS * 1280 / 1024 * 191 / 128)
    assert found["ragged-dot-none.7"] == pytest.approx(expected)


def test_what_multiplies_nothing_is_no_kernel_and_what_is_not_known_is_named(found):
    assert found["ragged-dot-metadata"] is None and found["pinned"] is None
    assert found["other"] == (kernels.UNKNOWN, 0, 0)
    assert costs.cost(PROGRAM).kernels == ("jit(step)/own_kernel",)


def test_an_attribute_of_several_lines_belongs_to_its_instruction():
    first = next(i for i in hlo.parse(PROGRAM).instructions if i.name.startswith("splash_mha_fwd"))
    assert first.origin == "jit(step)/jvp(attention)/splash_mha_fwd_residuals/pallas_call"


def test_the_cost_of_a_program_has_the_flops_of_its_kernels():
    cost = costs.cost(PROGRAM)
    assert cost.flops == (2 + 3 + 4) * SCORES // 2
    assert cost.grouped_flops == 3 * ROWS
