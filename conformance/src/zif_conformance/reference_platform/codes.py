"""Keys and values held as codes of 8 bits: a cache of rows that is read and written like one of float32 elements.

| a code for each element | nothing, up to a multiple of 4 | the scale, float32 |
"""

from typing import Any

import torch

_LARGEST = 127
_SCALE_BYTES = 4


class CodedCache:
    """One layer's cache. rows: [num_cells, block_size, 2, K, bytes of a vector], int8."""

    dtype = torch.float32

    def __init__(self, rows: torch.Tensor, head_dim: int) -> None:
        self._rows = rows
        self._head_dim = head_dim

    def __getitem__(self, place: Any) -> torch.Tensor:
        """Return the vectors at `place`, [..., D], float32."""
        rows = self._rows[place]
        scales = rows[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
        return rows[..., : self._head_dim].float() * scales

    def __setitem__(self, place: Any, vectors: torch.Tensor) -> None:
        """Store vectors, [..., D], at `place`."""
        rows = self._rows[place].clone()
        codes, scales = _coded(vectors)
        rows[..., : self._head_dim] = codes
        rows[..., -_SCALE_BYTES:] = scales.view(torch.int8)
        self._rows[place] = rows


def _coded(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes, [..., D], int8, and scales, [..., 1], float32, NaN where an element is not finite."""
    largest = vectors.abs().amax(dim=-1, keepdim=True)
    scales = largest / _LARGEST
    steps = (vectors / scales).masked_fill(largest == 0, 0.0)
    finite = vectors.isfinite().all(dim=-1, keepdim=True)
    codes = steps.masked_fill(~finite, 0.0).round().clamp(-_LARGEST, _LARGEST)
    return codes.to(torch.int8), scales.masked_fill(~finite, torch.nan)
