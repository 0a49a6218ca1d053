"""MXFP4 blocks to numbers: 4-bit elements in blocks of 32 that share a power of two.

OCP Microscaling Formats (MX), version 1.0: element E2M1, scale E8M0. Used by `zif.models.weights` when loading.
"""

import torch

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The number of each 4-bit code: sign, two bits of exponent, one of mantissa."""

_SCALE_BIAS = 127
_SCALE_NAN = 255


def dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Unpack blocks; exact in float32.

    blocks: [..., B, 16], uint8, the low half of a byte before the high half. scales: [..., B], uint8, exponents with
    bias 127, of which 255 is not a number. Returns [..., B * 32], float32.
    """
    codes = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).flatten(-2).int()
    numbers = torch.tensor(_E2M1, dtype=torch.float32, device=blocks.device)[codes]
    scaled = torch.ldexp(numbers, scales.int()[..., None] - _SCALE_BIAS)
    return scaled.masked_fill((scales == _SCALE_NAN)[..., None], torch.nan).flatten(-2)
