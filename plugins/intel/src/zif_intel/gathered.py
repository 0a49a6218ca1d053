"""Paged attention on any torch device: the blocks that a step sees are copied together, and torch's fused kernel runs.

For GPUs without a Triton that compiles for them. Layers with a soft cap or sinks, which the fused kernel does not know,
compute scores and weights in float32. Letters as in the contract; S key places.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from zif.contract import AttentionBackend, AttentionBatch, AttentionParams, KVArena, KVLayout, KVSpec
from zif.host.layout import kv_layout

_MAX_ROWS = 32
"""Requests with one new token that go together; each is padded to the longest."""


@dataclass(frozen=True, slots=True)
class GatheredCache:
    """One layer's KV. pages: [blocks * 2L, K, block_size, D] of the whole arena; keys at block * 2L + first_page."""

    pages: torch.Tensor
    pages_per_block: int
    first_page: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that attend together, B of them with W queries each. On the device.

    tokens: [B * W], rows of the step. blocks: [B, P]. hidden: [B, 1, W, S], which key places a query must not see;
    unused: [B, 1, S, 1], those that none sees.
    """

    tokens: torch.Tensor
    blocks: torch.Tensor
    hidden: torch.Tensor
    unused: torch.Tensor


@dataclass(frozen=True, slots=True)
class GatheredStep:
    """One group's step. blocks, offsets: [T], where KV goes."""

    window: int | None
    blocks: torch.Tensor
    offsets: torch.Tensor
    batches: tuple[Batch, ...]


class GatheredAttention(AttentionBackend[GatheredCache, GatheredStep]):
    """Attention over copies of the blocks in sight. Keeps no state."""

    def __init__(self, array_device: str) -> None:
        self._array_device = array_device

    def kv_layout(self, spec: KVSpec) -> KVLayout:
        return kv_layout(spec)

    def bind(self, arena: KVArena, group: int, memory: torch.Tensor) -> Sequence[GatheredCache]:
        layout = arena.groups[group].layout
        num_layers, _, num_kv_heads, block_size, head_dim = layout.shape
        elements = memory[: arena.num_cells(group) * layout.block_bytes].view(getattr(torch, layout.dtype))
        pages = elements.view(-1, num_kv_heads, block_size, head_dim)
        return [GatheredCache(pages, 2 * num_layers, 2 * layer) for layer in range(num_layers)]

    def prepare(self, batch: AttentionBatch) -> GatheredStep:
        slots = np.asarray(batch.slots, dtype=np.int64)
        return GatheredStep(
            window=batch.window,
            blocks=self._on_device(slots // batch.block_size),
            offsets=self._on_device(slots % batch.block_size),
            batches=tuple(self._batch(batch, requests) for requests in _together(batch)),
        )

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: GatheredCache, prepared: GatheredStep) -> None:
        pages = prepared.blocks * cache.pages_per_block + cache.first_page
        cache.pages[pages, :, prepared.offsets] = key.to(cache.pages.dtype)
        cache.pages[pages + 1, :, prepared.offsets] = value.to(cache.pages.dtype)

    def attend(
        self, query: torch.Tensor, cache: GatheredCache, prepared: GatheredStep, params: AttentionParams
    ) -> torch.Tensor:
        assert params.window == prepared.window, (
            f"window {params.window!r} of a layer, {prepared.window!r} of its group"
        )
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for batch in prepared.batches:
            rows = batch.blocks.shape[0]
            queries = query[batch.tokens].view(rows, -1, *query.shape[1:]).transpose(1, 2)
            pages = batch.blocks * cache.pages_per_block + cache.first_page
            keys = _gather(cache, pages).to(query.dtype)
            # A hidden value may be NaN, and zero times NaN is NaN.
            values = _gather(cache, pages + 1).to(query.dtype).masked_fill(batch.unused, 0.0)
            keys = keys.masked_fill(batch.unused, 0.0)
            attended = _attend(queries, keys, values, batch.hidden, params)
            out[batch.tokens] = attended.transpose(1, 2).reshape(-1, *query.shape[1:])
        return out

    def _batch(self, batch: AttentionBatch, requests: Sequence[int]) -> Batch:
        """Lay out requests with equally many queries."""
        chosen = np.asarray(requests)
        starts = batch.query_start[chosen].astype(np.int64)
        width = int(batch.query_start[chosen[0] + 1] - starts[0])
        seq_lens = batch.seq_lens[chosen].astype(np.int64)
        size, window = batch.block_size, batch.window
        first = np.zeros_like(seq_lens)
        if window is not None:
            first = np.maximum(seq_lens - width - window + 1, 0) // size
        last = (seq_lens - 1) // size
        logical = first[:, None] + np.arange(int((last - first).max()) + 1)
        blocks = batch.block_table[chosen[:, None], np.minimum(logical, last[:, None])]
        keys = (first * size)[:, None, None] + np.arange(logical.shape[1] * size)
        queries = (seq_lens - width)[:, None, None] + np.arange(width)[:, None]
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        return Batch(
            tokens=self._on_device((starts[:, None] + np.arange(width)).reshape(-1)),
            blocks=self._on_device(blocks.astype(np.int64)),
            hidden=self._on_device(hidden[:, None]),
            unused=self._on_device(hidden.all(1)[:, None, :, None]),
        )

    def _on_device(self, array: "np.ndarray[Any, np.dtype[Any]]") -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._array_device)


def _together(batch: AttentionBatch) -> Iterator[Sequence[int]]:
    """Yield requests that attend together: those with one new token in bounded numbers, the others one by one."""
    lengths = np.diff(batch.query_start)
    single = np.flatnonzero(lengths == 1)
    order = single[np.argsort(-batch.seq_lens[single], kind="stable")].tolist()
    yield from (order[start : start + _MAX_ROWS] for start in range(0, len(order), _MAX_ROWS))
    yield from ([request] for request in np.flatnonzero(lengths > 1).tolist())


def _gather(cache: GatheredCache, pages: torch.Tensor) -> torch.Tensor:
    """Copy pages [B, P]. Returns [B, K, S, D]."""
    found = cache.pages[pages]
    return found.permute(0, 2, 1, 3, 4).reshape(pages.shape[0], found.shape[2], -1, found.shape[4])


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor, params: AttentionParams
) -> torch.Tensor:
    """Attend. query: [B, H, W, D]; key, value: [B, K, S, D]. Returns [B, H, W, D], dtype of query."""
    if params.softcap is None and params.sinks is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=~hidden, scale=params.scale, enable_gqa=True
        )
    batch, num_heads, width, head_dim = query.shape
    num_kv_heads = key.shape[1]
    grouped = query.float().reshape(batch, num_kv_heads, -1, head_dim)
    scores = (grouped @ key.float().transpose(2, 3) * params.scale).view(batch, num_heads, width, -1)
    if params.softcap is not None:
        scores = torch.tanh(scores / params.softcap) * params.softcap
    scores = scores.masked_fill(hidden, -torch.inf)
    if params.sinks is not None:
        sinks = params.sinks.float().view(1, num_heads, 1, 1).expand(batch, -1, width, 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    out = weights.view(batch, num_kv_heads, -1, scores.shape[-1]) @ value.float()
    return out.view(batch, num_heads, width, head_dim).to(query.dtype)
