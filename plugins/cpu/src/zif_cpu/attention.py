"""Paged attention by native kernels, on the cache layout of `zif.host.attention`.

Prompts and single tokens go together: the kernels read keys and values where they lie, and what a query gets depends
on no other query of the step. Queries of another dtype than the cache's go through `TiledAttention`.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch

from zif.contract import AttentionBackend, AttentionBatch, AttentionParams, HostArray, KVArena, KVLayout, KVSpec
from zif.host.attention import LayerCache, TiledAttention
from zif.host.tiling import PreparedStep, TileLimits, prepare_step
from zif_cpu.library import DTYPE_CODES, INT8_CODE, AttentionCall, Library, RowsCall
from zif_cpu.recording import NotRecordableError, Recorder, address_of

_CODES = MappingProxyType({getattr(torch, name): code for name, code in DTYPE_CODES.items()})
_LAYER = ("keys", "values", "block_stride", "kv_heads", "head_dim", "dtype", "cache")
_ATTEND_LAYER = (*_LAYER, "query", "output", "sinks", "query_stride", "heads", "scale", "softcap")
_STORE_LAYER = (*_LAYER, "key", "value", "key_stride", "value_stride")


@dataclass(frozen=True, slots=True)
class NativeCache:
    """One layer's keys and values. keys, values: addresses; block_stride: elements of the cache; group: the layer's."""

    tiled: LayerCache
    group: int
    keys: int
    values: int
    block_stride: int
    code: int

    @property
    def dtype(self) -> torch.dtype:
        return self.tiled.keys.dtype


class NativeStep:
    """One group's step: what all its layers share. slots: [T], int64."""

    repeatable = True
    """Native calls alone serve the step."""

    def __init__(self, batch: AttentionBatch, batch_invariant: bool) -> None:
        self._batch = batch
        self.window = batch.window
        self.slots: HostArray = np.ascontiguousarray(batch.slots, np.int64)
        # Kept here, because the calls only point to them.
        requests = np.arange(len(batch.seq_lens), dtype=np.int32)
        columns = (requests, batch.query_start, batch.seq_lens, batch.block_table)
        self._arrays = [np.ascontiguousarray(column, np.int32) for column in columns]
        call = self.attend_call = AttentionCall()
        call.requests, call.query_start, call.seq_lens, call.block_table = (a.ctypes.data for a in self._arrays)
        call.num_requests, call.table_stride = len(requests), self._arrays[3].shape[1]
        call.block_size, call.window, call.batch_invariant = batch.block_size, batch.window or 0, batch_invariant
        store = self.store_call = RowsCall()
        store.slots, store.tokens, store.block_size = self.slots.ctypes.data, len(self.slots), batch.block_size
        self._attends: tuple[object, ...] = ()
        self._stores: tuple[object, ...] = ()

    def step_struct(self, kind: type[ctypes.Structure]) -> ctypes.Structure:
        """Return the call of `kind`: its fields that are no layer's hold for the whole step."""
        return self.attend_call if kind is AttentionCall else self.store_call

    @cached_property
    def tiled(self) -> PreparedStep:
        """The step cut for torch."""
        return prepare_step(self._batch, TileLimits())

    def set_attend(self, cache: NativeCache, params: AttentionParams, query: torch.Tensor) -> AttentionCall:
        """Set what layers have in common, where the last one had it otherwise."""
        call, sizes = self.attend_call, cache.tiled
        key = (cache.block_stride, sizes.num_kv_heads, sizes.head_dim, params.scale, params.softcap, query.shape[1])
        if key != self._attends:
            self._attends = key
            call.block_stride, call.kv_heads, call.head_dim = key[:3]
            call.scale, call.softcap, call.heads = params.scale, params.softcap or 0.0, query.shape[1]
        call.keys, call.values = cache.keys, cache.values
        call.dtype, call.cache = _CODES[query.dtype], cache.code
        return call

    def set_store(self, cache: NativeCache, dtype: torch.dtype) -> RowsCall:
        call, sizes = self.store_call, cache.tiled
        key = (cache.block_stride, sizes.num_kv_heads, sizes.head_dim)
        if key != self._stores:
            self._stores = key
            call.block_stride, call.kv_heads, call.head_dim = key
        call.keys, call.values = cache.keys, cache.values
        call.dtype, call.cache = _CODES[dtype], cache.code
        return call


class NativeAttention(AttentionBackend[NativeCache, NativeStep]):
    """Attention for float32, bfloat16 and float16 over a cache of the same dtype, or of codes. One thread calls."""

    def __init__(self, library: Library, batch_invariant: bool = False) -> None:
        self._batch_invariant = batch_invariant
        self._attend_kernel = library.raw.zif_cpu_attend
        self._store_kernel = library.raw.zif_cpu_store_kv
        self._tiled = TiledAttention()
        self._recorder: Recorder | None = None

    @contextmanager
    def recording(self, recorder: Recorder) -> Iterator[None]:
        """Let `recorder` hear the native calls that are made within the context."""
        self._recorder = recorder
        try:
            yield
        finally:
            self._recorder = None

    def kv_layout(self, spec: KVSpec) -> KVLayout:
        return self._tiled.kv_layout(spec)

    def bind(self, arena: KVArena, group: int, memory: torch.Tensor) -> list[NativeCache]:
        return [_native_cache(cache, group) for cache in self._tiled.bind(arena, group, memory)]

    def prepare(self, batch: AttentionBatch) -> NativeStep:
        return NativeStep(batch, self._batch_invariant)

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: NativeCache, prepared: NativeStep) -> None:
        if cache.code != INT8_CODE:
            key, value = key.to(cache.dtype), value.to(cache.dtype)
        call = prepared.set_store(cache, key.dtype)
        call.key, call.value = key.data_ptr(), value.data_ptr()
        call.key_stride, call.value_stride = key.stride(0), value.stride(0)
        if self._recorder is not None:
            self._recorder.step_call(address_of(self._store_kernel), call, cache.group, _STORE_LAYER)
        self._store_kernel(ctypes.byref(call))

    def attend(
        self, query: torch.Tensor, cache: NativeCache, prepared: NativeStep, params: AttentionParams
    ) -> torch.Tensor:
        assert params.window == prepared.window, (
            f"window {params.window!r} of a layer, {prepared.window!r} of its group"
        )
        if query.dtype not in _CODES or cache.code not in (_CODES[query.dtype], INT8_CODE):
            if self._recorder is not None:
                raise NotRecordableError(f"torch attends from {query.dtype} to a cache of {cache.dtype}")
            return self._tiled.attend(query, cache.tiled, prepared.tiled, params)
        out = torch.empty(query.shape, dtype=query.dtype)
        sinks = None if params.sinks is None else params.sinks.to(query.dtype).contiguous()
        call = prepared.set_attend(cache, params, query)
        call.query, call.output, call.query_stride = query.data_ptr(), out.data_ptr(), query.stride(0)
        call.sinks = None if sinks is None else sinks.data_ptr()
        if self._recorder is not None:
            self._recorder.step_call(address_of(self._attend_kernel), call, cache.group, _ATTEND_LAYER)
        self._attend_kernel(ctypes.byref(call))
        return out


def _native_cache(cache: LayerCache, group: int) -> NativeCache:
    code = INT8_CODE if cache.is_quantized else _CODES[cache.keys.dtype]
    addresses = cache.keys.data_ptr(), cache.values.data_ptr()
    return NativeCache(cache, group, *addresses, cache.block_stride * cache.keys.shape[1], code)
