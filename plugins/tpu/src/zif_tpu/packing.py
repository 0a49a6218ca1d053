"""A group's share of a step as one array of integers, so that one transfer brings a program all it needs.

The host side lays requests out in the rows of a shape; the traced side cuts the array up again at the same places.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from zif.contract import AttentionBatch, KVGroup, SlidingWindowSpec
from zif.runtime import StepBatch
from zif_tpu.attention import PreparedStep
from zif_tpu.buckets import StepGroup, StepShape

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TracedInputs:
    """A group's inputs inside a program. token_ids, positions, places: [N]; `prepared`: one for each layer group."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    prepared: tuple[PreparedStep, ...]


@dataclass(frozen=True, slots=True)
class Packing:
    """How the inputs of programs are packed for given layer groups."""

    groups: tuple[KVGroup, ...]

    def pack(self, group: StepGroup, batch: StepBatch, places: Int64, spare_place: int) -> Int32:
        """Lay out the group's requests. places: [T], the row of the hidden states for each token of the step.

        Padding computes token 0 at position 0, writes to the null block and leaves its result at `spare_place`.
        """
        shape, requests = group.shape, np.asarray(group.requests, dtype=np.int64)
        starts = batch.query_start[requests].astype(np.int64)
        lengths = batch.query_start[requests + 1] - starts
        row, column = np.nonzero(np.arange(shape.width) < lengths[:, None])
        source, target = starts[row] + column, row * shape.width + column

        def padded(values: Int64, padding: int = 0) -> Int64:
            out = np.full(shape.num_tokens, padding, dtype=np.int64)
            out[target] = values[source]
            return out

        last = np.zeros(shape.rows, dtype=np.int64)
        last[: len(requests)] = batch.positions[starts + lengths - 1]
        parts = [padded(batch.token_ids), padded(batch.positions), padded(places, spare_place), last]
        for index, layer_group in enumerate(self.groups):
            attention = batch.attention[index]
            first, blocks = _tables(attention, layer_group, shape, requests, lengths)
            parts += [padded(attention.slots), first, blocks.reshape(-1)]
        return np.concatenate(parts).astype(np.int32)

    def length(self, shape: StepShape) -> int:
        """Return how many integers the inputs of a shape are."""
        return sum(self._sizes(shape))

    def unpack(self, packed: torch.Tensor, shape: StepShape) -> TracedInputs:
        """Cut the array up. packed: [length(shape)], int32."""
        sizes = list(self._sizes(shape))
        ends = np.cumsum(sizes).tolist()
        packed = packed.long()  # what indexing takes
        pieces = iter([packed[end - size : end] for size, end in zip(sizes, ends, strict=True)])
        token_ids, positions, places, last = (next(pieces) for _ in range(4))
        prepared = []
        for group in self.groups:
            slots, first, blocks = (next(pieces) for _ in range(3))
            spec = group.spec
            prepared.append(
                PreparedStep(
                    block_size=spec.block_size,
                    window=spec.window if isinstance(spec, SlidingWindowSpec) else None,
                    slots=slots,
                    blocks=blocks.view(shape.rows, -1),
                    first_block=first.view(-1, 1),
                    positions=positions.view(shape.rows, shape.width),
                    last=last.view(-1, 1),
                )
            )
        return TracedInputs(token_ids, positions, places, tuple(prepared))

    def _sizes(self, shape: StepShape) -> Iterator[int]:
        yield from (shape.num_tokens,) * 3
        yield shape.rows
        for group in self.groups:
            yield from (shape.num_tokens, shape.rows, shape.rows * _num_blocks(group, shape))


def num_blocks(batch: StepBatch) -> Sequence[int]:
    """Return how many blocks the tokens of each request fill; all layer groups have blocks of one size."""
    attention = next(iter(batch.attention.values()))
    return (-(-attention.seq_lens // attention.block_size)).tolist()  # type: ignore[no-any-return]


def _num_blocks(group: KVGroup, shape: StepShape) -> int:
    """Return how many blocks of each request the queries of a shape may see: behind a window, few."""
    spec = group.spec
    if not isinstance(spec, SlidingWindowSpec):
        return shape.blocks
    return min(shape.blocks, -(-(spec.window + shape.width) // spec.block_size) + 1)


def _tables(
    attention: AttentionBatch, group: KVGroup, shape: StepShape, requests: Int64, lengths: Int64
) -> tuple[Int64, Int64]:
    """Return the first visible logical block of each row, [B], and the block ids from there on, [B, P]."""
    seq_lens = attention.seq_lens[requests].astype(np.int64)
    first = np.zeros(shape.rows, dtype=np.int64)
    if attention.window is not None:
        first[: len(requests)] = np.maximum(seq_lens - lengths - attention.window + 1, 0) // attention.block_size
    blocks = np.zeros((shape.rows, _num_blocks(group, shape)), dtype=np.int64)
    logical = first[: len(requests), None] + np.arange(blocks.shape[1])
    last = (seq_lens - 1) // attention.block_size
    # What lies behind a request's last block is hidden; the last block is an address that is legal, and near.
    logical = np.minimum(logical, last[:, None])
    blocks[: len(requests)] = attention.block_table[requests[:, None], logical]
    return first, blocks
