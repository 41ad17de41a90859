"""Released low-precision weights as float32: a few bits a number, and a scale for each block of numbers."""

import ml_dtypes
import numpy as np

FLOAT8_BLOCK = 128
MXFP4_BLOCK = 32


def dequantize_float8(weight_FD, scales):
    """Every number times the scale of its block of 128 x 128 (DeepSeek-V3's `weight_scale_inv`)."""
    F, D = weight_FD.shape
    scales_FD = np.repeat(np.repeat(scales, FLOAT8_BLOCK, axis=0)[:F], FLOAT8_BLOCK, axis=1)[:, :D]
    return weight_FD.astype(np.float32) * scales_FD.astype(np.float32)


def dequantize_mxfp4(blocks, scales):
    """(F, D) from bytes of two numbers each, the low four bits first, and a power of two for each 32 of them.

    blocks: (F, D / 32, 16) of E2M1 pairs; scales: (F, D / 32), exponents biased by 127 (OCP
    Microscaling Formats).
    """
    numbers = (
        np.stack([blocks & 15, blocks >> 4], axis=-1)
        .view(ml_dtypes.float4_e2m1fn)
        .astype(np.float32)
    )
    powers = np.array(scales).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    return (numbers.reshape(*scales.shape, MXFP4_BLOCK) * powers[..., None]).reshape(
        len(scales), -1
    )
