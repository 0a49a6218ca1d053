"""Paged attention through IPEX's kernels, on the cache as zif's host layout has it.

IPEX takes key pages and value pages as two arrays [pages, K, block_size, D]. In a block of ours lie, layer by layer, a
page of keys and a page of values, so the arena is one array of such pages: block b of layer l is key page
b * 2L + 2l, and its values are the page after it. The kernels are given the arena twice, the second time from page 1
on, and block tables in pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from zif.contract import AttentionBackend, AttentionBatch, AttentionParams, KVArena, KVLayout, KVSpec
from zif.host.attention import LayerCache, TiledAttention
from zif.host.tiling import PreparedStep

_kernels = torch.ops.torch_ipex
_MAX_SLOTS = 2**31 - 1
_NONE = -1
"""What the kernel takes for no window; a soft cap that is not positive is none."""


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
class SingleRows:
    """The requests with one new token. tokens: [R], int64, their rows of the step, None when there are no others.

    blocks: [R, B], int32, block ids. seq_lens: [R], int32.
    """

    tokens: torch.Tensor | None
    blocks: torch.Tensor
    seq_lens: torch.Tensor
    max_keys: int


class IpexStep:
    """One group's step. blocks, offsets: [T], int64, where KV goes. `single`: what the kernel serves, if anything."""

    def __init__(self, batch: AttentionBatch, tiled: TiledAttention) -> None:
        slots = torch.from_numpy(np.asarray(batch.slots, dtype=np.int64))
        self.block_size = batch.block_size
        self.window = batch.window
        self.blocks = slots // batch.block_size
        self.offsets = slots % batch.block_size
        self.single = _single_rows(batch) if batch.window is None else None
        self._batch = batch
        self._tiled = tiled

    @cached_property
    def tiled(self) -> PreparedStep:
        """Cut the whole step into tiles, for layers that the kernel does not serve."""
        return self._tiled.prepare(self._batch)

    @cached_property
    def others(self) -> PreparedStep:
        """Cut the requests with several new tokens into tiles."""
        return replace(self.tiled, decodes=())


class IpexAttention(AttentionBackend[IpexCache, IpexStep]):
    """IPEX's kernel for requests with one new token, and tiles of torch operations for what it does not serve.

    That is chunks of prompts, for which torch's fused kernel is faster than IPEX's (`benchmarks/ipex.py`); layers with
    sinks, which IPEX does not know; and windows: it reads blocks behind the window, which are others' by then,
    multiplies what it finds by zero, and zero times NaN is NaN.
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
        return IpexStep(batch, self._tiled)

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: IpexCache, prepared: IpexStep) -> None:
        # The kernel counts slots in 32 bits.
        if key.dtype != cache.keys.dtype or cache.keys.shape[0] * cache.keys.shape[2] > _MAX_SLOTS:
            self._tiled.write(key, value, cache.tiled, prepared.tiled)
            return
        pages = prepared.blocks * cache.pages_per_block + cache.first_page
        slots = (pages * prepared.block_size + prepared.offsets).int()
        _kernels.reshape_and_cache(key, value, cache.keys, cache.values, slots, "auto", 1.0, 1.0)

    def attend(
        self, query: torch.Tensor, cache: IpexCache, prepared: IpexStep, params: AttentionParams
    ) -> torch.Tensor:
        single = prepared.single
        unknown = params.window is not None or prepared.window is not None or params.sinks is not None
        if single is None or unknown or query.dtype != cache.keys.dtype:
            return self._tiled.attend(query, cache.tiled, prepared.tiled, params)
        if single.tokens is None:
            return _attend_single(query.contiguous(), cache, single, params)
        out = self._tiled.attend(query, cache.tiled, prepared.others, params)
        out[single.tokens] = _attend_single(query[single.tokens], cache, single, params)
        return out


def _single_rows(batch: AttentionBatch) -> SingleRows | None:
    """Return the requests with one new token as the kernel takes them; None when there are none."""
    chosen = np.diff(batch.query_start) == 1
    requests = np.flatnonzero(chosen)
    if not len(requests):
        return None
    seq_lens = np.ascontiguousarray(batch.seq_lens[requests], dtype=np.int32)
    num_blocks = -(-int(seq_lens.max()) // batch.block_size)
    tokens = None if chosen.all() else torch.from_numpy(batch.query_start[requests].astype(np.int64))
    return SingleRows(
        tokens=tokens,
        blocks=torch.from_numpy(np.ascontiguousarray(batch.block_table[requests, :num_blocks])),
        seq_lens=torch.from_numpy(seq_lens),
        max_keys=int(seq_lens.max()),
    )


def _attend_single(query: torch.Tensor, cache: IpexCache, rows: SingleRows, params: AttentionParams) -> torch.Tensor:
    """Attend from one query per request. query: [R, H, D]. Returns the same shape and dtype."""
    num_kv_heads = cache.keys.shape[1]
    group_size = query.shape[1] // num_kv_heads
    out = torch.empty_like(query)
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
    return out
