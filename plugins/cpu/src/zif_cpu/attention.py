"""Paged attention by native kernels, on the cache layout of `zif.host.attention`.

Short queries (decoding, verification of drafts) read keys and values where they lie. Prompts and their chunks
go through torch's fused kernel, as `TiledAttention` calls it: it has the matrix instructions.
"""

import ctypes
from functools import cached_property

import numpy as np
import torch

from zif.contract import AttentionBackend, AttentionBatch, AttentionParams, HostArray, KVArena, KVLayout, KVSpec
from zif.host.attention import LayerCache, TiledAttention
from zif.host.tiling import PreparedStep, TileLimits, prepare_step
from zif_cpu.library import DTYPE_CODES, AttentionCall, Library

MAX_SHORT_QUERIES = 8
"""Tokens of a request that go to the native kernel together; more go to torch."""

_CODES = {getattr(torch, name): code for name, code in DTYPE_CODES.items()}


class NativeStep:
    """One group's step: what all its layers share.

    slots: [T], int64. num_short: requests that the native kernel serves. tiled: the others, cut for torch, if any.
    """

    def __init__(self, batch: AttentionBatch) -> None:
        self._batch = batch
        self.window = batch.window
        self.block_size = batch.block_size
        self.slots: HostArray = np.ascontiguousarray(batch.slots, np.int64)
        short = np.flatnonzero(np.diff(batch.query_start) <= MAX_SHORT_QUERIES)
        self.num_short = len(short)
        # Kept here, because the call only points to them.
        columns = (short, batch.query_start, batch.seq_lens, batch.block_table)
        self._arrays = [np.ascontiguousarray(column, np.int32) for column in columns]
        call = self.call = AttentionCall()
        call.requests, call.query_start, call.seq_lens, call.block_table = (a.ctypes.data for a in self._arrays)
        call.num_requests, call.table_stride = len(short), self._arrays[3].shape[1]
        call.block_size, call.window = batch.block_size, batch.window or 0
        all_short = len(short) == len(batch.seq_lens)
        self.tiled = None if all_short else prepare_step(batch, TileLimits(), shortest=MAX_SHORT_QUERIES + 1)

    @cached_property
    def all_tiled(self) -> PreparedStep:
        """The whole step cut for torch."""
        return prepare_step(self._batch, TileLimits())


class NativeAttention(AttentionBackend[LayerCache, NativeStep]):
    """Attention for float32, bfloat16 and float16; layers share what is prepared for a step. One thread calls."""

    def __init__(self, library: Library) -> None:
        self._raw = library.raw
        self._tiled = TiledAttention()

    def kv_layout(self, spec: KVSpec) -> KVLayout:
        return self._tiled.kv_layout(spec)

    def bind(self, arena: KVArena, group: int, memory: torch.Tensor) -> list[LayerCache]:
        return list(self._tiled.bind(arena, group, memory))

    def prepare(self, batch: AttentionBatch) -> NativeStep:
        return NativeStep(batch)

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, prepared: NativeStep) -> None:
        keys, values = cache.keys, cache.values
        key, value = key.to(keys.dtype), value.to(keys.dtype)
        row = prepared.block_size * cache.head_dim
        self._raw.zif_cpu_write_kv(
            *(key.data_ptr(), key.stride(0), value.data_ptr(), value.stride(0), keys.data_ptr(), values.data_ptr()),
            *(cache.block_stride * row, prepared.slots.ctypes.data, len(key), cache.num_kv_heads, cache.head_dim),
            *(prepared.block_size, _CODES[keys.dtype]),
        )

    def attend(
        self, query: torch.Tensor, cache: LayerCache, prepared: NativeStep, params: AttentionParams
    ) -> torch.Tensor:
        assert params.window == prepared.window, (
            f"window {params.window!r} of a layer, {prepared.window!r} of its group"
        )
        if query.dtype != cache.keys.dtype:
            # The native kernel has one dtype for all.
            return self._tiled.attend(query, cache, prepared.all_tiled, params)
        out = torch.empty(query.shape, dtype=query.dtype)
        if prepared.num_short:
            self._attend_short(query, cache, prepared, params, out)
        if prepared.tiled is not None:
            self._tiled.attend_chunks(query, cache, prepared.tiled, params, out)
        return out

    def _attend_short(
        self, query: torch.Tensor, cache: LayerCache, prepared: NativeStep, params: AttentionParams, out: torch.Tensor
    ) -> None:
        call = prepared.call
        call.query, call.output, call.query_stride = query.data_ptr(), out.data_ptr(), query.stride(0)
        call.keys, call.values = cache.keys.data_ptr(), cache.values.data_ptr()
        call.block_stride = cache.block_stride * prepared.block_size * cache.head_dim
        call.heads, call.kv_heads, call.head_dim = query.shape[1], cache.num_kv_heads, cache.head_dim
        sinks = None if params.sinks is None else params.sinks.to(query.dtype).contiguous()
        call.sinks = None if sinks is None else sinks.data_ptr()
        call.scale, call.softcap = params.scale, params.softcap or 0.0
        call.dtype = _CODES[query.dtype]
        self._raw.zif_cpu_attend(ctypes.byref(call))
