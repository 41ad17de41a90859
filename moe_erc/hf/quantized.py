"""Released low-precision weights, converted to float32.

A number has a few bits, and a block of numbers has a scale.
"""

import ml_dtypes
import numpy as np

FLOAT8_BLOCK = 128
MXFP4_BLOCK = 32


def dequantize_float8(weight_FD: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Every number times the scale of its block of 128 x 128 (DeepSeek-V3's `weight_scale_inv`)."""
    F, D = weight_FD.shape
    # The last block of an axis may be incomplete.
    rows_of_scales = np.repeat(scales, FLOAT8_BLOCK, axis=0)[:F]
    scales_FD = np.repeat(rows_of_scales, FLOAT8_BLOCK, axis=1)[:, :D]
    return weight_FD.astype(np.float32) * scales_FD.astype(np.float32)


def dequantize_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(F, D) float32 from MXFP4 (OCP Microscaling Formats).

    Args:
      blocks: (F, D / 32, 16) bytes of two E2M1 numbers each, the low four bits first
      scales: (F, D / 32) exponents of two, biased by 127, one for each 32 numbers
    """
    pairs = np.stack([blocks & 15, blocks >> 4], axis=-1)
    numbers = pairs.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    powers = np.array(scales).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    scaled = numbers.reshape(*scales.shape, MXFP4_BLOCK) * powers[..., None]
    return scaled.reshape(len(scales), -1)
