"""What a cache holds of a vector: the rounding of its dtype, or codes of 8 bits with a scale, by arithmetic of numpy.

Clause 7.9: s = max|x| / 127 and x / s in float32, ties to even. No layout here: where codes lie is up to a platform.
"""

import numpy as np
import torch

from zif_conformance.oracle.inputs import torch_dtype

CODED = "int8"
"""The KV dtype of codes with scales."""
_LARGEST = np.float32(127)


def held(vectors: torch.Tensor, kv_dtype: str, wide: torch.dtype) -> torch.Tensor:
    """Return vectors, [..., D], as a cache of `kv_dtype` holds them, in the dtype `wide`."""
    if kv_dtype != CODED:
        return vectors.to(torch_dtype(kv_dtype)).to(wide)
    elements = vectors.float().numpy()
    with np.errstate(invalid="ignore"):
        scales = np.abs(elements).max(axis=-1, keepdims=True) / _LARGEST
        steps = np.divide(elements, scales, out=np.zeros_like(elements), where=scales > 0)
    scales[~np.isfinite(elements).all(axis=-1)] = np.nan
    codes = np.rint(steps).clip(-_LARGEST, _LARGEST) + 0  # a code has no zero of another sign
    return torch.from_numpy(codes).to(wide) * torch.from_numpy(scales).to(wide)
