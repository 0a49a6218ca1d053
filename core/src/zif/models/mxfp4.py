"""MXFP4 blocks to numbers: 4-bit elements in blocks of 32 that share a power of two.

OCP Microscaling Formats (MX), version 1.0: element E2M1, scale E8M0. Used by `zif.models.weights` when loading, in host
memory.
"""

import numpy as np
import torch

_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], np.float32)
"""The number of each 4-bit code: sign, two bits of exponent, one of mantissa."""

_PAIRS = np.stack((_E2M1[np.arange(256) & 0x0F], _E2M1[np.arange(256) >> 4]), axis=-1).view(np.complex64)[:, 0]
"""The two numbers of each byte, low half first, as one 8-byte word: half the look-ups, and no index arrays."""

_POWERS = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
"""The factor of each scale byte."""


def dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Unpack blocks; exact in float32.

    blocks: [..., B, 16], uint8, the low half of a byte before the high half. scales: [..., B], uint8, exponents with
    bias 127, of which 255 is not a number. Returns [..., B * 32], float32. All in host memory.
    """
    numbers = _PAIRS[blocks.numpy()].view(np.float32)
    with np.errstate(over="ignore"):  # Beyond float32 is infinity, which the caller's check of the result finds.
        numbers *= _POWERS[scales.numpy()][..., None]
    return torch.from_numpy(numbers).flatten(-2)
