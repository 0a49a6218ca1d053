"""A step's integers on the device: one copy for all of them, into fresh memory or into buffers that stay."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from zif.contract import AttentionBatch


@dataclass(frozen=True, slots=True)
class StepArrays:
    """query_start: [R + 1], seq_lens: [R], block_table: [R, blocks], int32. slots: [T], int64, -1 for none."""

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepKey:
    """Whose buffers they are: one layer group's, for one number of requests. Groups differ in more than their number
    where a caller holds several models."""

    group: int
    window: int | None
    block_size: int
    bucket: int


class StepBuffers:
    """Memory of one device for the integers of steps."""

    def __init__(self, array_device: str) -> None:
        self._device = torch.device(array_device)
        self._kept: dict[StepKey, StepArrays] = {}

    def copy(self, batch: AttentionBatch, more: Sequence[NDArray[np.int32]]) -> tuple[StepArrays, list[torch.Tensor]]:
        """Copy a step, and `more` arrays with it."""
        table = np.ascontiguousarray(batch.block_table)
        # The slots come first, where the alignment of eight bytes is sure.
        parts = [
            batch.slots.astype(np.int64).view(np.int32),
            batch.query_start,
            batch.seq_lens,
            table.reshape(-1),
            *more,
        ]
        sizes = [len(part) for part in parts]
        packed = torch.from_numpy(np.concatenate(parts, dtype=np.int32)).to(self._device)
        slots, query_start, seq_lens, flat, *others = packed.split(sizes)
        return StepArrays(query_start, seq_lens, flat.view(table.shape), slots.view(torch.int64)), others

    def refill(self, key: StepKey, batch: AttentionBatch) -> StepArrays:
        """Copy a step into the buffers of `key`; the same object as before unless the block table had to grow."""
        num_requests, num_blocks = batch.block_table.shape
        kept = self._kept.get(key)
        if kept is None or kept.block_table.shape[1] < num_blocks:
            # Room to grow: a graph that was captured over the buffers is lost when they move.
            widened = 1 << max(6, (num_blocks - 1).bit_length())
            kept = self._kept[key] = StepArrays(
                self._integers(batch.query_start),
                self._integers(batch.seq_lens),
                torch.zeros(num_requests, widened, dtype=torch.int32, device=self._device),
                torch.zeros(len(batch.slots), dtype=torch.int64, device=self._device),
            )
        kept.seq_lens.copy_(torch.from_numpy(np.asarray(batch.seq_lens, dtype=np.int32)))
        kept.block_table[:, :num_blocks].copy_(torch.from_numpy(np.asarray(batch.block_table, dtype=np.int32)))
        kept.slots.copy_(torch.from_numpy(np.ascontiguousarray(batch.slots, dtype=np.int64)))
        return kept

    def _integers(self, array: NDArray[np.int32]) -> torch.Tensor:
        return torch.tensor(array, dtype=torch.int32, device=self._device)
