"""KV blocks in and out of the cache: what goes to slower memory and comes back, by two programs per layer group."""

from typing import Protocol

import numpy as np
import torch

from zif.contract import BlockBytes, KVArena
from zif_tpu.programs import Program, compile_program


class CacheHolder(Protocol):
    """Who holds the cache between programs."""

    rows: torch.Tensor


class PageBlocks:
    """Implements `BlockMemory` over the pages. The programs are made at construction; may raise `CompilationError`."""

    def __init__(self, arena: KVArena, holder: CacheHolder, deadline_s: float) -> None:
        self._holder = holder
        self._row_counts = [g.layout.shape[0] * g.layout.shape[1] for g in arena.groups]
        self._readers: list[Program] = []
        self._writers: list[Program] = []
        rows = holder.rows
        for count in self._row_counts:
            index = torch.zeros(count, dtype=torch.int64).to(rows.device)
            block = torch.zeros(count, *rows.shape[1:], dtype=rows.dtype).to(rows.device)
            self._readers.append(compile_program(_read, (rows, index), frozenset(), deadline_s))
            self._writers.append(compile_program(_write, (rows, index, block), frozenset({0}), deadline_s))

    def read_block(self, group: int, block_id: int) -> BlockBytes:
        """Return a copy of a block's bytes; waits for what is under way on the device."""
        (block,) = self._readers[group](self._holder.rows, self._index(group, block_id))
        return block.cpu().view(torch.uint8).numpy().tobytes()

    def write_block(self, group: int, block_id: int, data: BlockBytes) -> None:
        """Overwrite a block, before whatever is started on the device afterwards."""
        rows = self._holder.rows
        # A copy, because torch wants memory that may be written.
        block = torch.frombuffer(bytearray(data), dtype=rows.dtype).view(-1, *rows.shape[1:])
        index = self._index(group, block_id)
        (self._holder.rows,) = self._writers[group](rows, index, block.to(rows.device))

    def _index(self, group: int, block_id: int) -> torch.Tensor:
        count = self._row_counts[group]
        index = np.arange(block_id * count, (block_id + 1) * count, dtype=np.int64)
        return torch.from_numpy(index).to(self._holder.rows.device)


def _read(rows: torch.Tensor, index: torch.Tensor) -> list[torch.Tensor]:
    return [rows.index_select(0, index)]


def _write(rows: torch.Tensor, index: torch.Tensor, block: torch.Tensor) -> list[torch.Tensor]:
    return [rows.index_put((index,), block)]
