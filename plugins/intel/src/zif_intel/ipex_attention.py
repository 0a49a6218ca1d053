"""Paged attention through IPEX's kernels, on the cache as zif's host layout has it.

IPEX takes key pages and value pages as two arrays [pages, K, block_size, D]. In a block of ours lie, layer by layer, a
page of keys and a page of values, so the arena is one array of such pages: block b of layer l is key page
b * 2L + 2l, and its values are the page after it. The kernels are given the arena twice, the second time from page 1
on, and block tables in pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from zif.contract import AttentionBackend, AttentionBatch, AttentionParams, KVArena, KVLayout, KVSpec
from zif.host.attention import LayerCache, TiledAttention
from zif.host.tiling import PreparedStep

_kernels = torch.ops.torch_ipex
_NONE = -1
"""What the kernels take for no window; a soft cap that is not positive is none."""


@dataclass(frozen=True, slots=True)
class IpexCache:
    """One layer's pages. keys, values: [pages, K, block_size, D], of the whole arena.

    Block b's page is b * pages_per_block + first_page in either. `tiled` is the same cache for portable attention.
    """

    keys: torch.Tensor
    values: torch.Tensor
    pages_per_block: int
    first_page: int
    tiled: LayerCache


@dataclass(frozen=True, slots=True)
class IpexRows:
    """Some requests of a step. tokens: [N], int64, their rows of the step, None when they are all of it.

    blocks: [R, B], int32, block ids. seq_lens: [R], int32. query_start, key_start: [R + 1], int32.
    """

    tokens: torch.Tensor | None
    blocks: torch.Tensor
    seq_lens: torch.Tensor
    query_start: torch.Tensor
    key_start: torch.Tensor
    max_queries: int
    max_keys: int


@dataclass(frozen=True, slots=True)
class IpexStep:
    """One group's step: requests with one new token, and the others. blocks, offsets: [T], where KV goes."""

    block_size: int
    blocks: torch.Tensor
    offsets: torch.Tensor
    single: IpexRows | None
    several: IpexRows | None
    tiled: PreparedStep


class IpexAttention(AttentionBackend[IpexCache, IpexStep]):
    """IPEX's kernels, and tiles of torch operations where they do not serve.

    That is layers with sinks, which the kernels do not know, and with windows: they read blocks behind the window,
    which are others' by then, multiply what they find by zero, and zero times NaN is NaN.
    """

    def __init__(self) -> None:
        self._tiled = TiledAttention()

    def kv_layout(self, spec: KVSpec) -> KVLayout:
        return self._tiled.kv_layout(spec)

    def bind(self, arena: KVArena, group: int, memory: torch.Tensor) -> Sequence[IpexCache]:
        layout = arena.groups[group].layout
        num_layers, _, num_kv_heads, block_size, head_dim = layout.shape
        elements = memory[: arena.num_cells(group) * layout.block_bytes].view(getattr(torch, layout.dtype))
        pages = elements.view(-1, num_kv_heads, block_size, head_dim)
        tiled = self._tiled.bind(arena, group, memory)
        return [IpexCache(pages, pages[1:], 2 * num_layers, 2 * layer, cache) for layer, cache in enumerate(tiled)]

    def prepare(self, batch: AttentionBatch) -> IpexStep:
        lengths = np.diff(batch.query_start)
        slots = torch.from_numpy(np.asarray(batch.slots, dtype=np.int64))
        fused = batch.window is None
        return IpexStep(
            block_size=batch.block_size,
            blocks=slots // batch.block_size,
            offsets=slots % batch.block_size,
            single=_rows(batch, lengths == 1) if fused else None,
            several=_rows(batch, lengths > 1) if fused else None,
            tiled=self._tiled.prepare(batch),
        )

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: IpexCache, prepared: IpexStep) -> None:
        if key.dtype != cache.keys.dtype:
            self._tiled.write(key, value, cache.tiled, prepared.tiled)
            return
        pages = prepared.blocks * cache.pages_per_block + cache.first_page
        slots = (pages * prepared.block_size + prepared.offsets).int()
        _kernels.reshape_and_cache(key, value, cache.keys, cache.values, slots, "auto", 1.0, 1.0)

    def attend(
        self, query: torch.Tensor, cache: IpexCache, prepared: IpexStep, params: AttentionParams
    ) -> torch.Tensor:
        unknown = params.window is not None or prepared.tiled.window is not None or params.sinks is not None
        if unknown or query.dtype != cache.keys.dtype:
            return self._tiled.attend(query, cache.tiled, prepared.tiled, params)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for rows, attend in ((prepared.single, _attend_single), (prepared.several, _attend_several)):
            if rows is None:
                continue
            if rows.tokens is None:
                attend(out, query.contiguous(), cache, rows, params)
            else:
                part = torch.empty(len(rows.tokens), *query.shape[1:], dtype=query.dtype)
                attend(part, query[rows.tokens], cache, rows, params)
                out[rows.tokens] = part
        return out


def _rows(batch: AttentionBatch, chosen: "np.ndarray") -> IpexRows | None:  # type: ignore[type-arg]
    """Return the chosen requests as the kernels take them; None when there are none."""
    requests = np.flatnonzero(chosen)
    if not len(requests):
        return None
    starts, ends = batch.query_start[requests], batch.query_start[requests + 1]
    tokens = None
    if len(requests) < len(chosen):
        tokens = torch.from_numpy(np.concatenate([np.arange(s, e) for s, e in zip(starts, ends, strict=True)]))
    seq_lens = np.ascontiguousarray(batch.seq_lens[requests], dtype=np.int32)
    num_blocks = -(-int(seq_lens.max()) // batch.block_size)
    return IpexRows(
        tokens=tokens,
        blocks=torch.from_numpy(np.ascontiguousarray(batch.block_table[requests, :num_blocks])),
        seq_lens=torch.from_numpy(seq_lens),
        query_start=_running_sum(ends - starts),
        key_start=_running_sum(seq_lens),
        max_queries=int((ends - starts).max()),
        max_keys=int(seq_lens.max()),
    )


def _running_sum(counts: "np.ndarray") -> torch.Tensor:  # type: ignore[type-arg]
    return torch.from_numpy(np.concatenate(([0], np.cumsum(counts))).astype(np.int32))


def _attend_single(
    out: torch.Tensor, query: torch.Tensor, cache: IpexCache, rows: IpexRows, params: AttentionParams
) -> None:
    """Attend from one query per request. out, query: [R, H, D]; writes `out`."""
    num_kv_heads = cache.keys.shape[1]
    group_size = query.shape[1] // num_kv_heads
    _kernels.single_query_cached_kv_attention(
        out,
        query,
        cache.keys,
        cache.values,
        torch.arange(num_kv_heads, dtype=torch.int32).repeat_interleave(group_size),
        params.scale,
        rows.blocks * cache.pages_per_block + cache.first_page,
        rows.seq_lens,
        cache.keys.shape[2],
        rows.max_keys,
        None,
        _NONE,
        1.0,
        1.0,
        _NONE if params.softcap is None else params.softcap,
    )


def _attend_several(
    out: torch.Tensor, query: torch.Tensor, cache: IpexCache, rows: IpexRows, params: AttentionParams
) -> None:
    """Attend from several queries per request. out, query: [N, H, D]; writes `out`."""
    _kernels.flash_attn_varlen_func(
        out,
        query,
        cache.keys,
        cache.values,
        rows.query_start,
        rows.key_start,
        rows.max_queries,
        rows.max_keys,
        params.scale,
        True,
        rows.blocks * cache.pages_per_block + cache.first_page,
        None,
        _NONE,
        _NONE,
        "auto",
        1.0,
        1.0,
        _NONE if params.softcap is None else params.softcap,
    )
