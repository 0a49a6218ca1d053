"""One attention step of a device over paged KV, laid out on purpose in the worst way that the contract allows.

Everything that must not be read is NaN, elements and scales of codes: the null block, free blocks, other layers, tails
of blocks, and what lies behind a window. Block ids are a random permutation; unused entries of the block table point at
the null block.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from zif.contract import (
    AttentionBatch,
    Buffer,
    Device,
    FullAttentionSpec,
    HostArray,
    KVArena,
    KVGroup,
    KVSpec,
    SlidingWindowSpec,
)
from zif_conformance.oracle.inputs import strided, torch_dtype
from zif_conformance.oracle.sequences import AttentionCase, Sequences

LAYERS = (0, 3, 5)
BOUND_LAYER = 1
_NUM_SPARE_BLOCKS = 3
_TAG = "conformance.kv"
NAN_BYTE = 0xFF
"""Memory of this byte is NaN in every floating-point type."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `first` to `last` - 1 of one request."""

    request: int
    first: int
    last: int


def spec_of(case: AttentionCase, layers: tuple[int, ...] = LAYERS) -> KVSpec:
    """Return the layer group of a case."""
    shape = (layers, case.num_kv_heads, case.head_dim, case.block_size, case.stored)
    return FullAttentionSpec(*shape) if case.window is None else SlidingWindowSpec(*shape, window=case.window)


@dataclass(slots=True)
class PagedStep:
    """The cache of a case on a device. `table`: [R, blocks], int32, block ids by request. Use as a context.

    With `far_bytes` the arena is that large, the blocks lie at its end, and nothing else of it is touched.
    """

    device: Device
    sequences: Sequences
    order_seed: int = 0
    far_bytes: int = 0
    table: HostArray = field(init=False)
    arena: KVArena = field(init=False)
    memory: torch.Tensor = field(init=False)
    caches: Items[object] = field(init=False)
    _buffer: Buffer[torch.Tensor] = field(init=False)

    @property
    def case(self) -> AttentionCase:
        """Return the case."""
        return self.sequences.case

    def __enter__(self) -> "PagedStep":
        spec = spec_of(self.case)
        group = KVGroup(spec, self.device.attention.kv_layout(spec))
        counts = [-(-seq_len // self.case.block_size) for _, seq_len in self.case.requests]
        num_used = sum(counts) + _NUM_SPARE_BLOCKS
        num_blocks = max(1 + num_used, self.far_bytes // group.layout.block_bytes)
        ids = list(np.random.default_rng(self.order_seed).permutation(num_used) + num_blocks - num_used)
        self.table = np.zeros((len(counts), max(counts) + 1), dtype=np.int32)
        for row, count in enumerate(counts):
            self.table[row, :count] = [ids.pop() for _ in range(count)]
        self.arena = KVArena(group.layout.block_bytes, num_blocks, (group,))
        self._buffer = self.device.allocator.allocate(self.arena.num_bytes, _TAG)
        self.memory = self._buffer.array
        if not self.far_bytes:
            self.memory.fill_(NAN_BYTE)
        self.caches = self.device.attention.bind(self.arena, 0, self.memory)
        return self

    def __exit__(self, *_: object) -> None:
        self.device.allocator.free(self._buffer)

    @property
    def elements(self) -> torch.Tensor:
        """View the whole arena as elements of the cache's dtype."""
        return self.memory.view(torch_dtype(self.case.stored))

    @property
    def cells(self) -> torch.Tensor:
        """View the arena block by block: [num_blocks, block_bytes], uint8."""
        return self.memory.view(self.arena.num_slabs, -1)

    def run(self) -> torch.Tensor:
        """Write earlier tokens, forget what no query sees, write the step's tokens and attend. Returns [T, H, D]."""
        requests = enumerate(self.case.requests)
        earlier = [Span(row, 0, seq_len - length) for row, (length, seq_len) in requests if seq_len > length]
        if earlier:
            self.write(earlier)
        self.forget_behind_window()
        return self.attend()

    def attend(self) -> torch.Tensor:
        """Write the step's tokens and attend from them."""
        pairs = enumerate(self.case.requests)
        prepared = self.write([Span(row, seq_len - length, seq_len) for row, (length, seq_len) in pairs])
        query = torch.cat([sequence.query for sequence in self.sequences.requests])
        cache, params = self.caches[BOUND_LAYER], self.sequences.params
        if params.sinks is not None:
            params = replace(params, sinks=params.sinks.to(self.device.array_device))
        out = self.device.attention.attend(self._on_device(query), cache, prepared, params)
        self.device.synchronize()
        assert (out.shape, out.dtype) == (query.shape, query.dtype), "the result is not like the query"
        return out.cpu()

    def write(self, spans: Items[Span]) -> object:
        """Write the tokens of `spans`; returns what `prepare` made of them."""
        prepared = self.device.attention.prepare(self.batch(spans))
        requests = self.sequences.requests
        key = torch.cat([requests[span.request].key[span.first : span.last] for span in spans])
        value = torch.cat([requests[span.request].value[span.first : span.last] for span in spans])
        cache = self.caches[BOUND_LAYER]
        self.device.attention.write(self._on_device(key), self._on_device(value), cache, prepared)
        self.device.synchronize()
        return prepared

    def forget_behind_window(self) -> None:
        """Take back the blocks that no query of the step sees: NaN in them, the null block in the table."""
        for row, (length, seq_len) in enumerate(self.case.requests):
            gone = self.case.first_visible(seq_len - length) // self.case.block_size
            if not gone:
                continue
            self.cells[self.table[row, :gone].tolist()] = NAN_BYTE
            self.table[row, :gone] = 0

    def batch(self, spans: Items[Span]) -> AttentionBatch:
        """Return the batch of a step over `spans`."""
        block_size = self.case.block_size
        positions = [np.arange(span.first, span.last) for span in spans]
        slots = [
            self.table[span.request, p // block_size].astype(np.int64) * block_size + p % block_size
            for span, p in zip(spans, positions, strict=True)
        ]
        return AttentionBatch(
            query_start=np.cumsum([0, *map(len, positions)]).astype(np.int32),
            seq_lens=np.array([span.last for span in spans], dtype=np.int32),
            block_table=self.table[[span.request for span in spans]],
            slots=np.concatenate(slots),
            block_size=block_size,
            window=self.case.window,
        )

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return strided(tensor.to(self.device.array_device))
