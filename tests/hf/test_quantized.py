"""Released number formats, by hand."""

import ml_dtypes
import numpy as np

from moe_erc.hf.quantized import dequantize_float8, dequantize_mxfp4


def test_mxfp4_has_two_numbers_a_byte_and_a_power_of_two_a_block():
    # 0x21: the low half 1 is 0.5, the high half 2 is 1.0.
    # 0xF7: 7 is 6, F is -6.
    # 0x08: 8 is -0, 0 is 0.
    blocks = np.zeros((1, 2, 16), np.uint8)
    blocks[0, 0, :3] = 0x21, 0xF7, 0x08
    blocks[0, 1, 15] = 0x5C  # C is -2, 5 is 3
    scales = np.array([[127 + 3, 127 - 1]], np.uint8)  # times 8, and times 1/2
    expected = np.zeros((1, 64), np.float32)
    expected[0, :4] = 4, 8, 48, -48
    expected[0, 62:] = -1, 1.5
    np.testing.assert_array_equal(dequantize_mxfp4(blocks, scales), expected)


def test_every_mxfp4_number():
    # A sign, two bits of exponent and one of mantissa: 0 and 1/2, then 2^(e - 1) (1 + m / 2).
    blocks = np.array([low | (low + 8) << 4 for low in range(8)] * 2, np.uint8).reshape(1, 1, 16)
    numbers = dequantize_mxfp4(blocks, np.array([[127]], np.uint8))[0, :16]
    np.testing.assert_array_equal(numbers[::2], [0, 0.5, 1, 1.5, 2, 3, 4, 6])
    np.testing.assert_array_equal(numbers[1::2], -numbers[::2])


def test_float8_has_a_scale_for_each_128_by_128():
    # 130 x 257 has 2 x 3 blocks. The last ones have 2 rows and 1 column.
    weight_FD = np.full((130, 257), 0.5, ml_dtypes.float8_e4m3fn)
    weight_FD[129, 256] = -448  # the largest of the format
    scales = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    numbers = dequantize_float8(weight_FD, scales)
    assert numbers.dtype == np.float32 and numbers.shape == (130, 257)
    assert numbers[0, 0] == numbers[127, 127] == 0.5 * 1
    assert numbers[127, 128] == numbers[0, 255] == 0.5 * 2
    assert numbers[128, 127] == 0.5 * 4
    assert numbers[0, 256] == 0.5 * 3
    assert numbers[128, 256] == 0.5 * 6 and numbers[129, 256] == -448 * 6
