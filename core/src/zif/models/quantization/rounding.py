"""Rounds numbers to codes while a checkpoint loads: what `zif.reference.quantization.quantize` says, in few passes.

A matrix goes through memory that is used again and again and stays in cache. Its parts are so small that torch gives
none of them to a second thread: waiting for one would cost more than it computes. Used by
`zif.models.quantization.loading`.
"""

import numpy as np
import torch

from zif.contract import WeightScheme

_PART_ELEMENTS = (1 << 15) - 1
"""Passed over at once; torch splits work of 32,768 elements and more."""
_PARTS = 16
"""Rounded together: their scales are computed in one go, and two megabytes of float32 stay in cache."""


class Rounder:
    """Rounds matrices of I inputs to one scheme, which has no zero points and groups that divide I."""

    def __init__(self, scheme: WeightScheme, num_inputs: int) -> None:
        self._bits = scheme.bits
        self._num_rows = max(1, _PART_ELEMENTS // num_inputs)
        group_size = scheme.group_size or num_inputs
        num_rows, num_groups = self._num_rows * _PARTS, num_inputs // group_size
        self._wide = torch.empty(num_rows, num_groups, group_size)
        self._low, self._high = torch.empty(num_rows, num_groups), torch.empty(num_rows, num_groups)
        self._pairs = torch.empty(self._num_rows, num_groups, group_size // 2)

    def round(self, rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Round rows, [R, I], any float dtype, to codes and scales as a weight holds them."""
        parts = (torch.split(tensor, self._wide.shape[0]) for tensor in (rows, codes, scales))
        for part in zip(*parts, strict=True):
            self._round_together(*part)

    def _round_together(self, rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        count = rows.shape[0]
        wide, low, high = (torch.split(part[:count], self._num_rows) for part in (self._wide, self._low, self._high))
        for source, target, lowest, highest in zip(torch.split(rows, self._num_rows), wide, low, high, strict=True):
            target.view(source.shape).copy_(source)
            torch.amin(target, -1, out=lowest)
            torch.amax(target, -1, out=highest)
        steps = self._steps(count, scales)
        targets = torch.split(codes, self._num_rows)
        for part, step, target in zip(wide, torch.split(steps, self._num_rows), targets, strict=True):
            # Not torch's rounding, which goes to a library that splits even the smallest work among threads.
            numbers = part.div_(step).numpy()
            np.rint(numbers, out=numbers)
            self._put(part, target)

    def _steps(self, count: int, scales: torch.Tensor) -> torch.Tensor:
        """Store the scales; return them as [R, G, 1]."""
        low, high = self._low[:count], self._high[:count]
        largest = torch.where(high > -low, high, low)
        steps = largest.abs_().div_(127) if self._bits == 8 else largest.div_(-8)
        steps.masked_fill_(steps == 0, 1.0)
        scales.copy_(steps)
        return steps[..., None]

    def _put(self, rounded: torch.Tensor, codes: torch.Tensor) -> None:
        """Store the codes of a part. rounded: [R, G, I / G], whole numbers."""
        if self._bits == 8:
            codes.copy_(rounded.clamp_(-127, 127).view(codes.shape))
            return
        lower, upper = rounded.clamp_(-8, 7).chunk(2, dim=-1)
        pairs = torch.add(lower, upper, alpha=16, out=self._pairs[: rounded.shape[0]])
        codes.copy_(pairs.add_(8 + 16 * 8).view(codes.shape))
