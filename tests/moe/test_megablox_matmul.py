"""Tiles of the megablox kernels; values and gradients are in test_grouped_matmul.py."""

import pytest

from moe_erc.moe import megablox_matmul as kernels


@pytest.mark.parametrize("itemsize", [2, 4], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    "depth, width", [(2048, 1024), (1536, 768), (2048, 384), (384, 192), (512, 256)], ids=str
)
def test_tiles_divide_the_sizes_of_our_models(depth, width, itemsize):
    for tiles in (kernels.tiles_of_rows, kernels.tiles_of_matrices):
        for of in ((depth, width), (width, depth)):
            deep, wide = tiles(512, *of, itemsize)
            assert of[0] % deep == 0
            assert of[1] % wide == 0


def test_tiles_by_hand():
    # With the whole depth, rows are read twice and the matrix once for a group. With half of it,
    # rows would be read once, but the matrix for every tile of rows.
    assert kernels.tiles_of_rows(512, 2048, 1024, 2) == (2048, 512)
    # Both halves of the rows are read once more than needed, whichever axis is cut.
    assert kernels.tiles_of_matrices(512, 2048, 1024, 2) == (1024, 1024)
    # No multiple of 128 divides 200: all of it.
    assert kernels.tiles_of_rows(512, 200, 96, 2) == (200, 96)


def test_a_mean_group_fills_four_tiles():
    assert kernels._rows_of_a_tile(8 * 2048, 8) == 512
    assert kernels._rows_of_a_tile(8 * 2048 - 1, 8) == 256
    assert kernels._rows_of_a_tile(49, 5) == 128
