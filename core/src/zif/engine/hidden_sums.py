"""The hidden states of one prompt, pooled as they come: what is kept is one vector, however long the prompt."""

import math

import numpy as np
from numpy.typing import NDArray

from zif.models.pooling import PoolingMode

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


class HiddenSums:
    """Pool rows in the order of their tokens. Sums are of float64, so that cuts between steps hardly show."""

    def __init__(self, mode: PoolingMode) -> None:
        self.num_tokens = 0
        self._mode = mode
        self._kept: Float64 | None = None

    def add(self, rows: Float32) -> None:
        """Take the rows of the next tokens. rows: [N, C]."""
        found = self._reduced(rows.astype(np.float64))
        self._kept = found if self._kept is None else self._joined(self._kept, found)
        self.num_tokens += len(rows)

    def pooled(self) -> Float32:
        """Return the vector of all tokens so far, [C]."""
        assert self._kept is not None, "no hidden state has come"
        return (self._kept / self._divisor()).astype(np.float32)

    def _reduced(self, rows: Float64) -> Float64:
        found: Float64
        match self._mode:
            case PoolingMode.LAST:
                found = rows[-1]
            case PoolingMode.FIRST:
                found = rows[0]
            case PoolingMode.MAX:
                found = rows.max(axis=0)
            case PoolingMode.WEIGHTED_MEAN:
                found = np.arange(self.num_tokens + 1, self.num_tokens + len(rows) + 1) @ rows
            case PoolingMode.MEAN | PoolingMode.MEAN_SQRT_LENGTH:
                found = rows.sum(axis=0)
        return found

    def _joined(self, kept: Float64, found: Float64) -> Float64:
        match self._mode:
            case PoolingMode.LAST:
                return found
            case PoolingMode.FIRST:
                return kept
            case PoolingMode.MAX:
                return np.maximum(kept, found)
            case PoolingMode.WEIGHTED_MEAN | PoolingMode.MEAN | PoolingMode.MEAN_SQRT_LENGTH:
                return kept + found

    def _divisor(self) -> float:
        match self._mode:
            case PoolingMode.MEAN:
                return self.num_tokens
            case PoolingMode.MEAN_SQRT_LENGTH:
                return math.sqrt(self.num_tokens)
            case PoolingMode.WEIGHTED_MEAN:
                return self.num_tokens * (self.num_tokens + 1) / 2
            case PoolingMode.LAST | PoolingMode.FIRST | PoolingMode.MAX:
                return 1.0
