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
        self._kept: dict[StepKey, tuple[torch.Tensor, StepArrays]] = {}

    def copy(self, batch: AttentionBatch, more: Sequence[NDArray[np.int64]]) -> tuple[StepArrays, list[torch.Tensor]]:
        """Copy a step, and `more` arrays with it."""
        table = np.ascontiguousarray(batch.block_table, dtype=np.int32)
        packed, sizes = _packed(batch, table, more)
        arrays, others = _views(torch.from_numpy(packed).to(self._device), sizes, table.shape)
        return arrays, others

    def refill(self, key: StepKey, batch: AttentionBatch) -> StepArrays:
        """Copy a step into the buffers of `key`; the same object as before unless the block table had to grow."""
        num_requests, num_blocks = batch.block_table.shape
        kept = self._kept.get(key)
        if kept is None or kept[1].block_table.shape[1] < num_blocks:
            # Room to grow: a graph that was captured over the buffers is lost when they move.
            width = 1 << max(6, (num_blocks - 1).bit_length())
        else:
            width = kept[1].block_table.shape[1]
        table = np.zeros((num_requests, width), dtype=np.int32)
        table[:, :num_blocks] = batch.block_table
        packed, sizes = _packed(batch, table, ())
        if kept is None or kept[1].block_table.shape[1] != width:
            # Buffers outlive the mode in which a caller happens to make them.
            with torch.inference_mode(False):
                memory = torch.zeros(len(packed), dtype=torch.int32, device=self._device)
                kept = self._kept[key] = memory, _views(memory, sizes, table.shape)[0]
        kept[0].copy_(torch.from_numpy(packed))
        return kept[1]


def _packed(
    batch: AttentionBatch, table: NDArray[np.int32], more: Sequence[NDArray[np.int64]]
) -> tuple[NDArray[np.int32], list[int]]:
    """Return all integers in one array, and the sizes of the parts."""
    # The slots come first, where the alignment of eight bytes is sure.
    slots = np.ascontiguousarray(batch.slots, dtype=np.int64).view(np.int32)
    parts = [slots, batch.query_start, batch.seq_lens, table.reshape(-1), *more]
    # Every part begins at a multiple of 16 bytes: kernels are compiled for how their arguments are aligned.
    padded = [np.pad(part, (0, -len(part) % 4)) for part in parts]
    return np.concatenate(padded, dtype=np.int32, casting="unsafe"), [len(part) for part in parts]


def _views(
    packed: torch.Tensor, sizes: Sequence[int], table_shape: tuple[int, ...]
) -> tuple[StepArrays, list[torch.Tensor]]:
    """View the parts of a packed array."""
    places = np.cumsum([0, *(size + -size % 4 for size in sizes)]).tolist()
    parts = [packed[first : first + size] for first, size in zip(places, sizes, strict=False)]
    slots, query_start, seq_lens, flat, *others = parts
    return StepArrays(query_start, seq_lens, flat.view(table_shape), slots.view(torch.int64)), others
