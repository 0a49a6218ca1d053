"""Paged attention in host memory, in plain torch: tiles of keys with an online softmax.

The cache is never copied as a whole: a tile gathers the blocks of some rows, a bounded number of tokens, and is used
at once. Single-token rows of all requests go together, sorted by length, so that short ones drop out of later tiles;
a prompt chunk goes alone. Scores and sums are float32 (online softmax: Milakov and Gimelshein, 2018; tiles: Dao et
al., 2022). How a step is cut into tiles is in `zif.host.tiling`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from zif.contract import (
    AttentionBackend,
    AttentionBatch,
    AttentionParams,
    AttentionSpec,
    KVArena,
    KVLayout,
    KVSpec,
)
from zif.host.layout import kv_layout
from zif.host.tiling import DecodeRows, FusedPart, PreparedStep, PromptChunk, TileLimits, prepare_step
from zif.reference.quantization import encode_vectors, row_scales


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values inside its group's arena.

    keys, values: [rows, block_size * E]; row `block * block_stride + head` is that block of that KV head. Both are
    views of the whole group that start at the layer's own first row. E, `token_elements`, is D; of int8 it is D codes,
    padding to a multiple of 4, and the 4 bytes of a float32 scale.
    """

    keys: torch.Tensor
    values: torch.Tensor
    block_stride: int
    num_kv_heads: int
    head_dim: int
    token_elements: int

    @property
    def is_quantized(self) -> bool:
        """Say whether keys and values are codes with scales."""
        return self.keys.dtype == torch.int8


class TiledAttention(AttentionBackend[LayerCache, PreparedStep]):
    """Tiled attention.

    Keeps a few tiles of working memory between calls; calls come from one thread.
    """

    def __init__(self, limits: TileLimits | None = None) -> None:
        self._limits = limits or TileLimits()
        self._scratch = _Scratch()

    def kv_layout(self, spec: KVSpec) -> KVLayout:
        return kv_layout(spec)

    def bind(self, arena: KVArena, group: int, memory: torch.Tensor) -> Sequence[LayerCache]:
        layout, spec = arena.groups[group].layout, arena.groups[group].spec
        assert isinstance(spec, AttentionSpec), f"KV of kind {spec.kind!r} is not claimed"
        num_layers, _, num_kv_heads, block_size, token_elements = layout.shape
        elements = memory[: arena.num_cells(group) * layout.block_bytes].view(_torch_dtype(layout.dtype))
        rows = elements.view(-1, block_size * token_elements)
        stride = num_layers * 2 * num_kv_heads
        sizes = (stride, num_kv_heads, spec.head_dim, token_elements)
        return [LayerCache(rows[i:], rows[i + num_kv_heads :], *sizes) for i in range(0, stride, 2 * num_kv_heads)]

    def prepare(self, batch: AttentionBatch) -> PreparedStep:
        return prepare_step(batch, self._limits)

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, prepared: PreparedStep) -> None:
        block_size = prepared.block_size
        first = prepared.write_blocks * (cache.block_stride * block_size) + prepared.write_offsets
        heads = torch.arange(cache.num_kv_heads) * block_size
        index = (first[:, None] + heads).flatten()
        for fresh, kept in ((key, cache.keys), (value, cache.values)):
            stored = encode_vectors(fresh) if cache.is_quantized else fresh.to(kept.dtype)
            rows = stored.reshape(-1, cache.token_elements)
            kept.view(-1, cache.token_elements).index_copy_(0, index, rows)

    def attend(
        self, query: torch.Tensor, cache: LayerCache, prepared: PreparedStep, params: AttentionParams
    ) -> torch.Tensor:
        assert params.window == prepared.window, (
            f"window {params.window!r} of a layer, {prepared.window!r} of its group"
        )
        out = torch.empty_like(query)
        layer = _Layer(cache, params, self._scratch)
        for decode in prepared.decodes:
            out[decode.rows] = layer.decode(query[decode.rows], decode).to(query.dtype)
        self.attend_chunks(query, cache, prepared, params, out)
        return out

    def attend_chunks(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        prepared: PreparedStep,
        params: AttentionParams,
        out: torch.Tensor,
    ) -> None:
        """Attend from the rows of prompt chunks alone. Mutates these rows of `out`, [T, H, D]."""
        layer = _Layer(cache, params, self._scratch)
        for chunk in prepared.chunks:
            rows = slice(chunk.first_row, chunk.last_row)
            parts = None if params.softcap is not None or params.sinks is not None else chunk.fused
            out[rows] = layer.chunk(query[rows], chunk) if parts is None else layer.fused(query[rows], parts)


class _Scratch:
    """Working memory by purpose, kept between tiles: fresh memory costs more in page faults than in use."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def tensor(self, purpose: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """Return a tensor of undefined content, valid until the next call for the same purpose."""
        num_bytes = math.prod(shape) * dtype.itemsize
        kept = self._kept.get(purpose)
        if kept is None or kept.numel() < num_bytes:
            kept = self._kept[purpose] = torch.empty(num_bytes, dtype=torch.uint8)
        return kept[:num_bytes].view(dtype).view(shape)


class _OnlineSoftmax:
    """Running maximum, sum and weighted values of `rows` query rows for each of `batch` heads.

    maximum, total: [batch, rows, 1]; weighted: [batch, rows, D]; all float32. A sink is where the sum starts.
    """

    def __init__(self, query: torch.Tensor, sinks: torch.Tensor | None) -> None:
        shape = (*query.shape[:-1], 1)
        if sinks is None:
            # The lowest finite value, not -inf: a row whose keys are all hidden so far must give exp(-inf) = 0.
            self.maximum = query.new_full(shape, torch.finfo(query.dtype).min)
            self.total = query.new_zeros(shape)
        else:
            self.maximum = sinks.to(query.dtype).expand(shape).clone(memory_format=torch.contiguous_format)
            self.total = query.new_ones(shape)
        self.weighted = torch.zeros_like(query)

    def add(self, where: tuple[slice, ...], scores: torch.Tensor, values: torch.Tensor) -> None:
        """Take in one tile for the rows at `where`. scores: [batch, rows, S], overwritten. values: [batch, S, D]."""
        maximum, total, weighted = self.maximum[where], self.total[where], self.weighted[where]
        raised = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        decay = maximum.sub_(raised).exp_()
        weights = scores.sub_(raised).exp_()
        total.mul_(decay).add_(weights.sum(-1, keepdim=True))
        weighted.mul_(decay).baddbmm_(weights, values)
        maximum.copy_(raised)

    def result(self) -> torch.Tensor:
        """Return the attention output [batch, rows, D], float32."""
        return self.weighted.div_(self.total)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's attention in one step."""

    cache: LayerCache
    params: AttentionParams
    scratch: _Scratch

    def decode(self, query: torch.Tensor, decode: DecodeRows) -> torch.Tensor:
        """Attend from single-token rows, [N, H, D], longest first. Returns [N, H, D], float32."""
        num_rows, num_heads, head_dim = query.shape
        num_kv_heads = self.cache.num_kv_heads
        grouped = (
            query.float().mul(self.params.scale).view(num_rows * num_kv_heads, num_heads // num_kv_heads, head_dim)
        )
        sinks = self.params.sinks
        softmax = _OnlineSoftmax(
            grouped, None if sinks is None else sinks.view(num_kv_heads, -1, 1).repeat(num_rows, 1, 1)
        )
        for tile in decode.tiles:
            rows = tile.blocks.shape[0]
            keys, values = self._tile(tile.blocks)
            scores = self._scores(grouped[: rows * num_kv_heads], keys)
            if tile.hidden is not None:
                scores.view(rows, num_kv_heads, -1, keys.shape[1]).masked_fill_(tile.hidden[:, None, None], -torch.inf)
                # A hidden value may be NaN, and zero times NaN is NaN.
                values.view(rows, num_kv_heads, -1, head_dim)[tile.hidden_rows, :, tile.hidden_keys] = 0.0
            softmax.add((slice(rows * num_kv_heads),), scores, values)
        return softmax.result().view(query.shape)

    def chunk(self, query: torch.Tensor, chunk: PromptChunk) -> torch.Tensor:
        """Attend from one request's adjacent queries, [L, H, D]. Returns [L, H, D], dtype of query."""
        num_queries, num_heads, head_dim = query.shape
        num_kv_heads = self.cache.num_kv_heads
        group_size = num_heads // num_kv_heads
        by_head = query.view(num_queries, num_kv_heads, group_size, head_dim).transpose(0, 1).float()
        grouped = by_head.mul(self.params.scale).reshape(num_kv_heads, num_queries * group_size, head_dim)
        sinks = self.params.sinks
        if sinks is not None:
            sinks = sinks.view(num_kv_heads, 1, group_size).expand(-1, num_queries, -1).reshape(num_kv_heads, -1, 1)
        softmax = _OnlineSoftmax(grouped, sinks)
        for tile in chunk.tiles:
            keys, values = (part[:, tile.first_token : tile.last_token] for part in self._tile(tile.blocks[None]))
            for part in tile.parts:
                rows = (slice(None), slice(part.first_query * group_size, part.last_query * group_size))
                scores = self._scores(grouped[rows], keys)
                if part.hidden is not None:
                    by_query = scores.view(num_kv_heads, -1, group_size, scores.shape[-1])
                    by_query.masked_fill_(part.hidden[None, :, None], -torch.inf)
                softmax.add(rows, scores, values)
        by_query = softmax.result().view(num_kv_heads, num_queries, group_size, head_dim).transpose(0, 1)
        return by_query.reshape(query.shape).to(query.dtype)

    def fused(self, query: torch.Tensor, parts: Sequence[FusedPart]) -> torch.Tensor:
        """Attend from one request's adjacent queries, [L, H, D], with torch's fused kernel. Returns [L, H, D].

        One call per query head of a group: each sees the KV heads as they are, so nothing is expanded.
        """
        num_queries, num_heads, head_dim = query.shape
        # Scaled codes are no numbers of a half type: they are multiplied as they are.
        wide = query.float() if self.cache.is_quantized else query
        grouped = wide.view(num_queries, self.cache.num_kv_heads, num_heads // self.cache.num_kv_heads, head_dim)
        out = torch.empty_like(grouped)
        for part in parts:
            tokens = slice(part.first_token, part.last_token)
            rows = slice(part.first_query, part.last_query)
            tiles = self._tile(part.blocks[None], wide.dtype)
            keys, values = (tile[None, :, tokens] for tile in tiles)
            visible = None if part.hidden is None else ~part.hidden
            for head in range(grouped.shape[2]):
                queries = grouped[rows, :, head].transpose(0, 1)[None]
                attended = F.scaled_dot_product_attention(
                    queries, keys, values, attn_mask=visible, is_causal=part.causal, scale=self.params.scale
                )
                out[rows, :, head] = attended[0].transpose(0, 1)
        return out.view(query.shape).to(query.dtype)

    def _scores(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return the logits of scaled queries. query: [batch, rows, D]. keys: [batch, S, D]. [batch, rows, S]."""
        scores = self.scratch.tensor("scores", torch.float32, *query.shape[:2], keys.shape[1])
        torch.bmm(query, keys.transpose(1, 2), out=scores)
        if self.params.softcap is not None:
            scores.div_(self.params.softcap).tanh_().mul_(self.params.softcap)
        return scores

    def _tile(self, blocks: torch.Tensor, dtype: torch.dtype = torch.float32) -> Sequence[torch.Tensor]:
        """Copy blocks [N, B] as keys and values, each [N * K, B * block_size, D], of `dtype`."""
        return [
            self._converted(purpose, self._gather(purpose, part, blocks), dtype)
            for purpose, part in (("keys", self.cache.keys), ("values", self.cache.values))
        ]

    def _converted(self, purpose: str, tile: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a gathered tile as elements of `dtype`."""
        if tile.dtype == dtype:
            return tile
        shape = (*tile.shape[:-1], self.cache.head_dim)
        converted = self.scratch.tensor(f"{purpose} {dtype}", dtype, *shape).copy_(tile[..., : self.cache.head_dim])
        return converted.mul_(row_scales(tile)) if self.cache.is_quantized else converted

    def _gather(self, purpose: str, part: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Copy blocks [N, B] of the keys or the values. Returns [N * K, B * block_size, E]."""
        heads = torch.arange(self.cache.num_kv_heads)[:, None]
        rows = (blocks[:, None, :] * self.cache.block_stride + heads).flatten()
        gathered = self.scratch.tensor(purpose, part.dtype, rows.numel(), part.shape[1])
        torch.index_select(part, 0, rows, out=gathered)
        return gathered.view(blocks.shape[0] * self.cache.num_kv_heads, -1, self.cache.token_elements)


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    assert isinstance(dtype, torch.dtype), f"dtype {name!r} is no torch dtype; plans admit only those"
    return dtype
