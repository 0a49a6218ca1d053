"""Paged attention in operations that XLA compiles: rows of requests, padded to one width, against gathered pages.

Shapes: B requests, W new tokens of each at most, P pages of each at most, S = P * block_size key places; T, H, K, D as
in the contract. The caches of all layers are pages of one array, so no layer's cache is ever cut out of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from zif.contract import AttentionBackend, AttentionBatch, AttentionParams, KVArena, KVLayout, KVSpec
from zif_tpu.bits import decoded, encoded
from zif_tpu.layout import kv_layout


@dataclass(slots=True)
class Pages:
    """The arena as tokens. rows: [pages * block_size, 2 * K, D]; keys at even places of the second axis.

    The elements are of `dtype`, or rows has their bits as integers, with as many more in the last axis.

    `aliases` says that `rows` views memory that others see, so that writes go there; if not, a write makes a new array,
    which the compiled program puts where the old one was.
    """

    rows: torch.Tensor
    dtype: torch.dtype
    aliases: bool

    def write(self, index: torch.Tensor, values: torch.Tensor) -> None:
        """Store values [T, 2 * K, D] at the places `index`, [T]."""
        values = encoded(values.to(self.dtype), self.rows.dtype)
        if self.aliases:
            self.rows.index_put_((index,), values)
        else:
            self.rows = self.rows.index_put((index,), values)

    def read(self, pages: torch.Tensor, page_size: int) -> torch.Tensor:
        """Copy pages, [N]. Returns [N, page_size, 2 * K, D], `dtype`."""
        found = self.rows.view(-1, page_size, *self.rows.shape[1:]).index_select(0, pages)
        return decoded(found, self.dtype)


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's pages: `layer` is the layer's place in its group's blocks, of `num_layers` pages each."""

    pages: Pages
    layer: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """One group's step on the device, index arrays int64.

    slots: [T], where each token's KV goes, as block id * block_size + offset. blocks: [B, P], block ids from logical
    block `first_block` [B, 1] on. positions: [B, W] of the queries. last: [B, 1], the last position that a request's
    queries have. gather: [B * W], the token of each place, and scatter: [T], the place of each token, both None when
    tokens come padded: token b * W + w is the w-th of request b.
    """

    block_size: int
    window: int | None
    slots: torch.Tensor
    blocks: torch.Tensor
    first_block: torch.Tensor
    positions: torch.Tensor
    last: torch.Tensor
    gather: torch.Tensor | None = None
    scatter: torch.Tensor | None = None


class XlaAttention(AttentionBackend[LayerCache, PreparedStep]):
    """Attention with float32 scores and sums; on a TPU its ragged kernel where that serves. Keeps no state."""

    def __init__(self, array_device: str, *, uses_kernel: bool = False) -> None:
        self._array_device = array_device
        self._uses_kernel = uses_kernel

    def kv_layout(self, spec: KVSpec) -> KVLayout:
        return kv_layout(spec)

    def bind(self, arena: KVArena, group: int, memory: torch.Tensor) -> Sequence[LayerCache]:
        """View the arena as pages; every group sees all of them."""
        layout = arena.groups[group].layout
        _, _, num_kv_heads, _, head_dim = layout.shape
        dtype: torch.dtype = getattr(torch, layout.dtype)
        rows = memory.view(-1, 2 * num_kv_heads, head_dim * dtype.itemsize)
        pages, num_layers = Pages(rows, dtype, aliases=True), layout.shape[0]
        return [LayerCache(pages, layer, num_layers) for layer in range(num_layers)]

    def prepare(self, batch: AttentionBatch) -> PreparedStep:
        """Lay the requests out in rows as wide as the longest, and put all index arrays on the device."""
        lengths = np.diff(batch.query_start).astype(np.int64)
        num_requests, width = len(lengths), max(1, int(lengths.max(initial=1)))
        seq_lens = batch.seq_lens.astype(np.int64)
        places = np.arange(width)
        positions = np.where(places < lengths[:, None], (seq_lens - lengths)[:, None] + places, 0)
        scatter = np.concatenate([row * width + np.arange(length) for row, length in enumerate(lengths)])
        gather = np.zeros(num_requests * width, dtype=np.int64)
        gather[scatter] = np.arange(len(scatter))
        first = np.zeros(num_requests, dtype=np.int64)
        if batch.window is not None:
            first = np.maximum(seq_lens - lengths - batch.window + 1, 0) // batch.block_size
        last_block = -(-seq_lens // batch.block_size)
        logical = first[:, None] + np.arange(max(1, int((last_block - first).max(initial=1))))
        # What lies behind a request's last block is hidden; its first block is an address that is legal, and near.
        logical = np.where(logical < last_block[:, None], logical, first[:, None])
        blocks = np.take_along_axis(batch.block_table.astype(np.int64), logical, axis=1)
        return PreparedStep(
            block_size=batch.block_size,
            window=batch.window,
            slots=self._on_device(batch.slots),
            blocks=self._on_device(blocks),
            first_block=self._on_device(first[:, None]),
            positions=self._on_device(positions),
            last=self._on_device(seq_lens[:, None] - 1),
            gather=self._on_device(gather),
            scatter=self._on_device(scatter),
        )

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, prepared: PreparedStep) -> None:
        size = prepared.block_size
        page = (prepared.slots // size) * cache.num_layers + cache.layer
        index = page * size + prepared.slots % size
        cache.pages.write(index, torch.stack((key, value), dim=2).flatten(1, 2))

    def attend(
        self, query: torch.Tensor, cache: LayerCache, prepared: PreparedStep, params: AttentionParams
    ) -> torch.Tensor:
        assert params.window == prepared.window, (
            f"window {params.window!r} of a layer, {prepared.window!r} of its group"
        )
        padded = query if prepared.gather is None else query.index_select(0, prepared.gather)
        out = self._attend(padded, cache, prepared, params)
        return (out if prepared.scatter is None else out.index_select(0, prepared.scatter)).to(query.dtype)

    def _attend(
        self, query: torch.Tensor, cache: LayerCache, prepared: PreparedStep, params: AttentionParams
    ) -> torch.Tensor:
        if self._uses_kernel:
            from zif_tpu import ragged

            if ragged.serves(cache, params):
                return ragged.attend(query, cache, prepared, params)
        return _attend(query, cache, prepared, params)

    def _on_device(self, array: "np.ndarray[Any, np.dtype[Any]]") -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(self._array_device)


def _attend(query: torch.Tensor, cache: LayerCache, step: PreparedStep, params: AttentionParams) -> torch.Tensor:
    """Attend from padded queries, [B * W, H, D]. Returns the same shape, float32."""
    num_requests, width = step.positions.shape
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = cache.pages.rows.shape[1] // 2
    keys, values = _gather(cache, step)
    visible = _visible(step)
    # A hidden value may be NaN, and zero times NaN is NaN.
    values = values.masked_fill(~visible.any(1)[:, None, :, None], 0.0)
    grouped = query.float().view(num_requests, width, num_kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4) * params.scale
    grouped = grouped.reshape(num_requests, num_kv_heads, -1, head_dim)
    scores = torch.matmul(grouped, keys.transpose(2, 3))
    if params.softcap is not None:
        scores = torch.tanh(scores / params.softcap) * params.softcap
    scores = scores.view(num_requests, num_kv_heads, -1, width, keys.shape[2])
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    weights = _softmax(scores, params.sinks)
    out = torch.matmul(weights.view(num_requests, num_kv_heads, -1, keys.shape[2]), values)
    by_query = out.view(num_requests, num_kv_heads, -1, width, head_dim).permute(0, 3, 1, 2, 4)
    return by_query.reshape(num_requests * width, num_heads, head_dim)


def _gather(cache: LayerCache, step: PreparedStep) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the pages of each request. Returns keys and values, each [B, K, S, D], float32."""
    chosen = (step.blocks * cache.num_layers + cache.layer).flatten()
    found = cache.pages.read(chosen, step.block_size)
    gathered = found.view(step.blocks.shape[0], -1, *found.shape[2:])
    by_head = gathered.permute(0, 2, 1, 3).float()
    return by_head[:, 0::2], by_head[:, 1::2]


def _visible(step: PreparedStep) -> torch.Tensor:
    """Return which key places each query sees: [B, W, S]. Places of padding see their request's first key."""
    num_places = step.blocks.shape[1] * step.block_size
    places = torch.arange(num_places, device=step.blocks.device) + step.first_block * step.block_size
    keys, queries = places[:, None, :], step.positions[:, :, None]
    visible = (keys <= queries) & (keys <= step.last[:, :, None])
    if step.window is not None:
        visible = visible & (keys > queries - step.window)
    return visible


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Normalize over keys; a sink takes its share. scores: [B, K, H / K, W, S]. sinks: [H]. Dtype of scores.

    A query that sees nothing, as only padding does, gets zeros.
    """
    peak = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    if sinks is not None:
        sink = sinks.float().view(1, scores.shape[1], -1, 1, 1)
        peak = torch.maximum(peak, sink)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    total = total + torch.exp(sink - peak) if sinks is not None else total.clamp(min=torch.finfo(scores.dtype).tiny)
    return weights / total
