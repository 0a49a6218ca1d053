"""Paged attention of the contract, served by the kernels of `zif.kernels.paged`, on any device that Triton knows.

A step is planned on the host once per layer group: short queries (decoding, verification of drafts) go to programs that
split the keys, long ones (prompts and their chunks) to programs with many queries. A step in which every request has
one new token is padded to a bucket and lies in buffers that stay, so that a captured graph finds it there.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from zif.contract import AttentionBackend, AttentionBatch, AttentionParams, KVArena, KVLayout, KVSpec
from zif.host.layout import kv_layout
from zif.kernels.dense_prefill import dense_spans
from zif.kernels.launch import Launcher
from zif.kernels.paged_calls import (
    MAX_SHORT_QUERIES,
    AttentionCall,
    Members,
    PagedCache,
    PreparedPages,
    paged_attention,
    write_kv,
)
from zif.kernels.step_buffers import StepBuffers, StepKey

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of decoding requests to which a step is padded."""

INVARIANT_KEYS = 512
"""Keys of a split where results must not depend on the batch."""


class PagedAttention(AttentionBackend[PagedCache, PreparedPages]):
    """Attention by kernels. Calls come from one thread.

    With `batch_invariant`, a request's result is bit for bit the same in every batch: tile sizes and splits then
    depend on the request alone, and there are no buckets.
    """

    def __init__(self, launch: Launcher, array_device: str, *, batch_invariant: bool = False) -> None:
        self._launch = launch
        self._batch_invariant = batch_invariant
        self._buffers = StepBuffers(array_device)
        self._padded: dict[StepKey, PreparedPages] = {}
        self._fresh: tuple[PagedCache, torch.Tensor, torch.Tensor] | None = None

    def kv_layout(self, spec: KVSpec) -> KVLayout:
        return kv_layout(spec)

    def bind(self, arena: KVArena, group: int, memory: torch.Tensor) -> Sequence[PagedCache]:
        layout = arena.groups[group].layout
        num_layers, _, num_kv_heads, block_size, head_dim = layout.shape
        elements = memory[: arena.num_cells(group) * layout.block_bytes].view(getattr(torch, layout.dtype))
        part = num_kv_heads * block_size * head_dim
        sizes = 2 * num_layers * part, num_kv_heads, block_size, head_dim
        return [PagedCache(elements[2 * i * part :], elements[(2 * i + 1) * part :], *sizes) for i in range(num_layers)]

    def prepare(self, batch: AttentionBatch) -> PreparedPages:
        lengths = np.diff(batch.query_start)
        if self._batch_invariant or len(lengths) > BUCKETS[-1] or bool((lengths != 1).any()):
            return self._prepare(batch)
        bucket = next(size for size in BUCKETS if size >= len(lengths))
        return self._prepare_padded(_padded(batch, bucket), bucket)

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: PagedCache, prepared: PreparedPages) -> None:
        write_kv(self._launch, key, value, cache, prepared.arrays.slots)
        # Whole prompts are served from these, so that they are not read back; only the layer that wrote them is.
        self._fresh = (cache, key, value) if prepared.dense else None

    def attend(
        self, query: torch.Tensor, cache: PagedCache, prepared: PreparedPages, params: AttentionParams
    ) -> torch.Tensor:
        assert params.window == prepared.window, (
            f"window {params.window!r} of a layer, {prepared.window!r} of its group"
        )
        fresh = self._fresh[1:] if self._fresh is not None and self._fresh[0] is cache else None
        call = AttentionCall(params, split_keys=INVARIANT_KEYS if self._batch_invariant else 0, fresh=fresh)
        return paged_attention(self._launch, query, cache, prepared, call)

    def _prepare(self, batch: AttentionBatch) -> PreparedPages:
        lengths = np.diff(batch.query_start)
        # Results must not depend on the batch: one kind of program then serves all.
        most = 0 if self._batch_invariant else MAX_SHORT_QUERIES
        chosen = [np.flatnonzero(lengths <= most), np.flatnonzero(lengths > most)]
        dense = () if self._batch_invariant else dense_spans(self._launch, batch)
        rows = {row for span in dense for row in range(span.first, span.last)}
        chosen.append(np.array([i for i in chosen[1].tolist() if dense and int(batch.query_start[i]) not in rows], int))
        starts = [np.concatenate(([0], np.cumsum(lengths[ids]))) for ids in chosen]
        arrays, parts = self._buffers.copy(batch, [*chosen, *starts])
        short, long, others = (_members(parts[i], parts[3 + i], chosen[i], batch) for i in range(3))
        return PreparedPages(arrays, short, long, batch.window, dense=dense, others=others)

    def _prepare_padded(self, batch: AttentionBatch, bucket: int) -> PreparedPages:
        """Refill the buffers of this group and bucket; a new answer only where they had to grow."""
        key = StepKey(batch.group, batch.window, batch.block_size, bucket)
        arrays = self._buffers.refill(key, batch)
        known = self._padded.get(key)
        if known is None or known.arrays is not arrays:
            starts = arrays.query_start
            # As many keys as the buffers can ever hold: a graph that was captured serves all of them.
            max_keys = arrays.block_table.shape[1] * batch.block_size
            members = Members(starts[:bucket], starts, bucket, single=True, max_keys=max_keys)
            known = self._padded[key] = PreparedPages(arrays, members, None, batch.window, bucket)
        return known


def _members(
    places: torch.Tensor, starts: torch.Tensor, ids: NDArray[np.int64], batch: AttentionBatch
) -> Members | None:
    if not len(ids):
        return None
    lengths = np.diff(batch.query_start)[ids]
    max_keys = int(batch.seq_lens[ids].max())
    if batch.window is not None:
        max_keys = min(max_keys, batch.window + int(lengths.max()))
    single = bool((lengths == 1).all())
    return Members(places, starts, int(lengths.sum()), single, max_keys)


def _padded(batch: AttentionBatch, bucket: int) -> AttentionBatch:
    """Add requests without tokens, that write nothing."""
    missing = bucket - len(batch.seq_lens)
    return replace(
        batch,
        query_start=np.arange(bucket + 1, dtype=np.int32),
        seq_lens=np.pad(batch.seq_lens, (0, missing)),
        block_table=np.pad(batch.block_table, ((0, missing), (0, 0))),
        slots=np.pad(batch.slots, (0, missing), constant_values=-1),
    )


def representative(launch: Launcher) -> None:
    """Start the kernels as models do: decoding, verification and prompts; also windows, caps, sinks, narrow caches."""
    plain = AttentionParams(scale=0.1)
    gpt_oss = AttentionParams(0.1, window=128, sinks=torch.empty(64, dtype=torch.bfloat16, device="meta"))
    gemma = AttentionParams(0.1, window=4096, softcap=50.0)
    nearest = AttentionParams(0.1, window=1)
    for heads, head_dim, dtypes, params in (
        ((32, 8), 128, (torch.bfloat16, torch.bfloat16), plain),
        ((32, 8), 128, (torch.float16, torch.float16), plain),
        ((32, 8), 128, (torch.bfloat16, torch.float8_e4m3fn), plain),
        ((32, 8), 128, (torch.bfloat16, torch.int8), plain),
        ((64, 8), 64, (torch.bfloat16, torch.bfloat16), gpt_oss),
        ((16, 8), 256, (torch.bfloat16, torch.bfloat16), gemma),
        ((32, 32), 96, (torch.bfloat16, torch.bfloat16), plain),
        ((8, 1), 512, (torch.bfloat16, torch.bfloat16), plain),
        ((32, 8), 128, (torch.bfloat16, torch.bfloat16), nearest),
        ((32, 8), 128, (torch.float32, torch.float32), plain),
    ):
        for lengths in ((1,) * 64, (4,) * 16, (2048,)):
            _start_on_meta(launch, (heads, head_dim, dtypes), params, np.array(lengths))


def _start_on_meta(
    launch: Launcher,
    sizes: tuple[tuple[int, int], int, tuple[torch.dtype, torch.dtype]],
    params: AttentionParams,
    lengths: NDArray[np.int64],
) -> None:
    (num_heads, num_kv_heads), head_dim, (dtype, kv_dtype) = sizes
    num_tokens, part = int(lengths.sum()), num_kv_heads * 16 * head_dim
    pages = torch.empty(64 * part, dtype=kv_dtype, device="meta")
    scales = None if kv_dtype == dtype else torch.empty(2, device="meta")
    cache = PagedCache(pages, pages, 64 * part, num_kv_heads, 16, head_dim, scales)
    starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    table = np.zeros((len(lengths), 512), np.int32)
    slots = np.zeros(num_tokens, np.int64)
    batch = AttentionBatch(starts, np.full(len(lengths), 8192, np.int32), table, slots, 16, params.window)
    prepared = PagedAttention(launch, "meta").prepare(batch)
    heads = torch.empty(num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, device="meta")
    query, key, value = heads.split((num_heads, num_kv_heads, num_kv_heads), 1)
    write_kv(launch, key, value, cache, prepared.arrays.slots)
    paged_attention(launch, query, cache, prepared, AttentionCall(params))
