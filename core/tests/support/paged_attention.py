"""One attention step over paged KV, built from whole sequences, so that any backend can be checked against float64.

Memory starts as NaN everywhere: free blocks, block tails, other layers, and blocks behind a window stay so, and a
backend that reads them shows it.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from support.dense_attention import DenseAttention
from zif.contract import (
    AttentionBackend,
    AttentionBatch,
    AttentionParams,
    FullAttentionSpec,
    KVArena,
    KVGroup,
    SlidingWindowSpec,
)

LAYERS = (0, 3, 5)
BOUND_LAYER = 1
NAN_BYTE = 0xFF
"""Bytes that are NaN in every floating-point type, scales of codes included."""


@dataclass(frozen=True)
class StepCase:
    """`requests` are (queries in this step, tokens with KV after it)."""

    requests: tuple[tuple[int, int], ...]
    num_kv_heads: int = 2
    group_size: int = 2
    head_dim: int = 16
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    shared_blocks: int = 0
    seed: int = 0

    @property
    def dtype_name(self) -> str:
        return str(self.kv_dtype or self.dtype).removeprefix("torch.")


@dataclass
class PagedStep:
    """Whole sequences of a case and the block table that holds them."""

    case: StepCase
    queries: list[torch.Tensor] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        case = self.case
        generator = torch.Generator().manual_seed(case.seed)
        num_heads = case.num_kv_heads * case.group_size
        for _, seq_len in case.requests:
            for kept, heads in (
                (self.queries, num_heads),
                (self.keys, case.num_kv_heads),
                (self.values, case.num_kv_heads),
            ):
                kept.append(torch.randn(seq_len, heads, case.head_dim, generator=generator).to(case.dtype))
        shared = case.shared_blocks * case.block_size
        for kept in (self.keys, self.values):
            for tensor in kept[1:]:
                tensor[:shared] = kept[0][:shared]
        sinks = torch.randn(num_heads, generator=generator).to(case.dtype) if case.sinks else None
        self.params = AttentionParams(case.head_dim**-0.5, case.window, case.softcap, sinks)
        self.table, self.num_blocks = self._block_table()

    def _block_table(self):
        """Give each request randomly chosen blocks; the shared ones are those of the first request."""
        case = self.case
        counts = [-(-seq_len // case.block_size) for _, seq_len in case.requests]
        num_blocks = sum(counts) + 4
        free = list(np.random.default_rng(case.seed).permutation(num_blocks - 1) + 1)
        table = np.zeros((len(counts), max(counts) + 1), dtype=np.int32)
        for row, count in enumerate(counts):
            shared = case.shared_blocks if row else 0
            table[row, :shared] = table[0, :shared]
            table[row, shared:count] = [free.pop() for _ in range(count - shared)]
        return table, num_blocks

    def expected(self) -> torch.Tensor:
        """Compute the step's rows densely in float64."""
        keys, values = ([self._held(tensor) for tensor in kept] for kept in (self.keys, self.values))
        params = AttentionParams(
            self.params.scale,
            self.params.window,
            self.params.softcap,
            None if self.params.sinks is None else self.params.sinks.double(),
        )
        dense = DenseAttention()
        outputs = [
            dense(0, q.double(), k, v, params)[len(q) - length :]
            for (length, _), q, k, v in zip(self.case.requests, self.queries, keys, values, strict=True)
        ]
        return torch.cat(outputs)

    def _held(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return what the cache holds of keys or values, float64; of int8, codes times scales."""
        if self.case.kv_dtype is not torch.int8:
            return vectors.double()
        elements = vectors.float().numpy()
        scales = np.abs(elements).max(-1, keepdims=True) / np.float32(127)
        codes = np.rint(np.divide(elements, scales, out=np.zeros_like(elements), where=scales > 0))
        return torch.from_numpy(codes.clip(-127, 127).astype(np.float64) * scales)

    def run(self, backend: AttentionBackend) -> torch.Tensor:
        """Write earlier tokens, then the step's, then attend."""
        self.bind(backend)
        case = self.case
        earlier = [
            (row, 0, seq_len - length) for row, (length, seq_len) in enumerate(case.requests) if seq_len > length
        ]
        if earlier:
            self.write(backend, earlier)
            self.free_behind_window()
        return self.attend(backend)

    def bind(self, backend: AttentionBackend) -> None:
        case = self.case
        shape = (LAYERS, case.num_kv_heads, case.head_dim, case.block_size, case.dtype_name)
        spec = FullAttentionSpec(*shape) if case.window is None else SlidingWindowSpec(*shape, window=case.window)
        group = KVGroup(spec, backend.kv_layout(spec))
        self.arena = KVArena(group.layout.block_bytes, self.num_blocks, (group,))
        memory = torch.empty(self.arena.num_bytes, dtype=torch.uint8)
        self.elements = memory.view(case.kv_dtype or case.dtype)
        memory.fill_(NAN_BYTE)
        self.cache = backend.bind(self.arena, 0, memory)[BOUND_LAYER]

    def write(self, backend: AttentionBackend, spans: list[tuple[int, int, int]]):
        """Write tokens `first` to `last` - 1 and return the step. `spans`: (request, first, last)."""
        prepared = backend.prepare(self.batch(spans))
        key, value = (torch.cat([kept[row][a:b] for row, a, b in spans]) for kept in (self.keys, self.values))
        backend.write(key, value, self.cache, prepared)
        return prepared

    def free_behind_window(self) -> None:
        """Take back the blocks that no query of the step sees, and fill them with NaN."""
        case = self.case
        if case.window is None:
            return
        cells = self.elements.view(torch.uint8).view(self.num_blocks, -1)
        for row, (length, seq_len) in enumerate(case.requests):
            gone = max(0, seq_len - length - case.window + 1) // case.block_size
            if case.shared_blocks == 0:
                cells[torch.from_numpy(self.table[row, :gone].astype(np.int64))] = NAN_BYTE
            self.table[row, :gone] = 0

    def attend(self, backend: AttentionBackend) -> torch.Tensor:
        requests = self.case.requests
        spans = [(row, seq_len - length, seq_len) for row, (length, seq_len) in enumerate(requests)]
        prepared = self.write(backend, spans)
        query = torch.cat([self.queries[row][first:last] for row, first, last in spans])
        return backend.attend(query, self.cache, prepared, self.params)

    def batch(self, spans: list[tuple[int, int, int]]) -> AttentionBatch:
        block_size = self.case.block_size
        positions = [np.arange(first, last) for _, first, last in spans]
        slots = [
            self.table[row, p // block_size].astype(np.int64) * block_size + p % block_size
            for (row, _, _), p in zip(spans, positions, strict=True)
        ]
        return AttentionBatch(
            query_start=np.cumsum([0, *map(len, positions)]).astype(np.int32),
            seq_lens=np.array([last for _, _, last in spans], dtype=np.int32),
            block_table=self.table[[row for row, _, _ in spans]],
            slots=np.concatenate(slots),
            block_size=block_size,
            window=self.case.window,
        )
