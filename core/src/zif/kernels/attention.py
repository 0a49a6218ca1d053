"""Paged attention of the contract, served by the kernels of `zif.kernels.paged`, on any device that Triton knows.

A step is planned on the host once per layer group: short queries (decoding, verification of drafts) go to programs that
split the keys, long ones (prompts and their chunks) to programs with many queries. A step in which every request has
one new token is padded to a bucket and lies in buffers that stay, so that a captured graph finds it there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from zif.contract import AttentionBackend, AttentionBatch, AttentionParams, KVArena, KVLayout, KVSpec
from zif.host.layout import kv_layout
from zif.kernels.launch import Launcher
from zif.kernels.paged import _merge_splits, _paged_attention, _write_kv
from zif.kernels.step_buffers import StepArrays, StepBuffers, StepKey
from zif.kernels.tuning import LaunchConfig

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of decoding requests to which a step is padded."""

INVARIANT_KEYS = 512
"""Keys of a split where results must not depend on the batch."""

_MIN_SPLIT_KEYS = 256
_MAX_SPLITS = 64
MAX_SHORT_QUERIES = 8
"""New tokens of a request that still count as few: a token and its draft."""

_LONG = 1 << 20
"""More queries than any tile holds: asks the tuning for the configuration of prompts."""


@dataclass(frozen=True, slots=True)
class PagedCache:
    """One layer's KV. keys, values: flat views that start at the layer's first key and value of block 0.

    scales: [2], float32, of keys and values, where they are stored in a narrower dtype; else None.
    """

    keys: torch.Tensor
    values: torch.Tensor
    block_stride: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    scales: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Members:
    """The requests of a step that one kind of program serves.

    ids: [N], int32. starts: [N + 1], int32, their queries summed up. `single` when each has one query. `max_keys` is
    the longest row of keys among them, None where any may come: in a padded step.
    """

    ids: torch.Tensor
    starts: torch.Tensor
    num_queries: int
    single: bool
    max_keys: int | None


@dataclass(frozen=True, slots=True)
class PreparedPages:
    """One group's step, on the device.

    `short` are requests with few queries, `long` the others. `bucket` is the number of requests after padding, where
    every request has one token and the arrays stay where they are.
    """

    arrays: StepArrays
    short: Members | None
    long: Members | None
    window: int | None
    bucket: int | None = None


@dataclass(frozen=True, slots=True)
class Extras:
    """What the kernels know beyond the contract's attention.

    slopes: [H], float32, of ALiBi (Press et al., 2022). lse: [T, H], float32, gets the logarithm of each softmax's
    denominator. Without `causal`, every query sees all tokens of its request.
    """

    slopes: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    causal: bool = True


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one call is asked. `split_keys` 0: as many splits as fill the device, else keys of each."""

    params: AttentionParams
    extras: Extras = field(default_factory=Extras)
    split_keys: int = 0


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

    def attend(
        self, query: torch.Tensor, cache: PagedCache, prepared: PreparedPages, params: AttentionParams
    ) -> torch.Tensor:
        assert params.window == prepared.window, (
            f"window {params.window!r} of a layer, {prepared.window!r} of its group"
        )
        call = AttentionCall(params, split_keys=INVARIANT_KEYS if self._batch_invariant else 0)
        return paged_attention(self._launch, query, cache, prepared, call)

    def _prepare(self, batch: AttentionBatch) -> PreparedPages:
        lengths = np.diff(batch.query_start)
        # Results must not depend on the batch: one kind of program then serves all.
        most = 0 if self._batch_invariant else MAX_SHORT_QUERIES
        chosen = [np.flatnonzero(lengths <= most), np.flatnonzero(lengths > most)]
        arrays, parts = self._buffers.copy(batch, [_ids_and_starts(ids, lengths) for ids in chosen])
        short, long = (_members(part, ids, batch) for part, ids in zip(parts, chosen, strict=True))
        return PreparedPages(arrays, short, long, batch.window)

    def _prepare_padded(self, batch: AttentionBatch, bucket: int) -> PreparedPages:
        """Refill the buffers of this group and bucket; a new answer only where they had to grow."""
        key = StepKey(batch.group, batch.window, batch.block_size, bucket)
        arrays = self._buffers.refill(key, batch)
        known = self._padded.get(key)
        if known is None or known.arrays is not arrays:
            starts = arrays.query_start
            members = Members(starts[:bucket], starts, bucket, single=True, max_keys=None)
            known = self._padded[key] = PreparedPages(arrays, members, None, batch.window, bucket)
        return known


def write_kv(launch: Launcher, key: torch.Tensor, value: torch.Tensor, cache: PagedCache, slots: torch.Tensor) -> None:
    """Store keys and values, [T, K, D], at `slots`, [T]; -1 stores nothing. Mutates the cache.

    In a narrower dtype, each is divided by its scale and clamped to what the dtype can hold.
    """
    num_rows = slots.shape[0] * cache.num_kv_heads
    config = launch.tuning.config("write_kv", head_dim=cache.head_dim)
    dtype = cache.keys.dtype
    limit = torch.finfo(dtype).max if dtype.is_floating_point else 127.0
    sizes = num_rows, key.stride(0), value.stride(0), cache.block_stride
    launch(
        _write_kv,
        (triton.cdiv(num_rows, config["ROWS"]),),
        (key, value, cache.keys, cache.values, slots, cache.scales, *sizes),
        config,
        NUM_HEADS=cache.num_kv_heads,
        HEAD_DIM=cache.head_dim,
        BLOCK_SIZE=cache.block_size,
        BLOCK_D=triton.next_power_of_2(cache.head_dim),
        LIMIT=float(limit),
        INTEGER=not dtype.is_floating_point,
    )


def paged_attention(
    launch: Launcher, query: torch.Tensor, cache: PagedCache, step: PreparedPages, call: AttentionCall
) -> torch.Tensor:
    """Attend from each query, [T, H, D], to the tokens of its own request. Returns [T, H, D], dtype of query.

    Raises `ValueError` when query heads are no multiple of KV heads, or for a window without causality.
    """
    if query.stride()[1:] != (query.shape[2], 1):
        raise ValueError(f"query has strides {query.stride()}; heads and elements must be adjacent: make it contiguous")
    if call.params.window is not None and not call.extras.causal:
        raise ValueError(f"window={call.params.window!r} needs causality; leave out the window")
    if query.shape[1] % cache.num_kv_heads:
        raise ValueError(f"{query.shape[1]} query heads are no multiple of {cache.num_kv_heads} KV heads")
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for members in (step.short, step.long):
        if members is not None:
            _Launch(launch, cache, step.arrays, members, call).run(query, out)
    return out


@dataclass(frozen=True, slots=True)
class _Launch:
    """Attention of some members of a step."""

    launch: Launcher
    cache: PagedCache
    arrays: StepArrays
    members: Members
    call: AttentionCall

    def run(self, query: torch.Tensor, out: torch.Tensor) -> None:
        """Start the kernel, and the merge where keys are split. Mutates `out`."""
        num_heads, head_dim = query.shape[1:]
        group = num_heads // self.cache.num_kv_heads
        config = self._config(query, group)
        block_m = config["BLOCK_M"]
        num_tiles = self._num_tiles(block_m // group)
        num_splits = self._num_splits(num_tiles, config)
        partial = extremes = None
        if num_splits > 1:
            rows = num_splits * num_tiles * self.cache.num_kv_heads * block_m
            partial = torch.empty(rows, head_dim, dtype=torch.float32, device=query.device)
            extremes = torch.empty(rows, 2, dtype=torch.float32, device=query.device)
        shapes = {
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "SINGLE": self.members.single,
        }
        grid = num_tiles, self.cache.num_kv_heads
        self._attend((query, out, partial, extremes), (*grid, num_splits), config, shapes)
        if num_splits > 1:
            self._merge((partial, extremes, out), grid, (block_m, num_splits), shapes)

    def _attend(
        self,
        results: tuple[torch.Tensor | None, ...],
        grid: tuple[int, ...],
        config: LaunchConfig,
        shapes: dict[str, int],
    ) -> None:
        query, out, partial, extremes = results
        assert query is not None
        cache, arrays, params, extras = self.cache, self.arrays, self.call.params, self.call.extras
        places = self.members.ids, self.members.starts, arrays.query_start, arrays.seq_lens, arrays.block_table
        strides = query.stride(0), cache.block_stride, arrays.block_table.stride(0)
        numbers = query.shape[1], params.window or 0, float(params.scale), float(params.softcap or 0.0)
        self.launch(
            _paged_attention,
            grid,
            (query, cache.keys, cache.values, out, partial, extremes, extras.lse, params.sinks, extras.slopes)
            + (*places, cache.scales, self.members.ids.shape[0], *strides, *numbers),
            config,
            **shapes,
            BLOCK_SIZE=cache.block_size,
            CAUSAL=extras.causal,
            WINDOWED=params.window is not None,
            CAPPED=params.softcap is not None,
            SPLIT_KEYS=self.call.split_keys if grid[2] > 1 else 0,
        )

    def _merge(
        self,
        results: tuple[torch.Tensor | None, ...],
        grid: tuple[int, ...],
        sizes: tuple[int, int],
        shapes: dict[str, int],
    ) -> None:
        partial, extremes, out = results
        assert out is not None
        block_m, num_splits = sizes
        members = self.members
        self.launch(
            _merge_splits,
            grid,
            (partial, extremes, out, self.call.extras.lse, members.ids, members.starts, self.arrays.query_start)
            + (self.arrays.seq_lens, self.cache.scales, members.ids.shape[0], out.shape[1]),
            self.launch.tuning.config("merge_attention", head_dim=self.cache.head_dim),
            **shapes,
            BLOCK_M=block_m,
            NUM_SPLITS=num_splits,
        )

    def _config(self, query: torch.Tensor, group: int) -> LaunchConfig:
        """Choose tiles; at least one query with all its heads goes into a tile."""
        long = self.members.num_queries > MAX_SHORT_QUERIES * self.members.ids.shape[0]
        mean = _LONG if long or self.call.split_keys else -(-self.members.num_queries // self.members.ids.shape[0])
        config = self.launch.tuning.config(
            "paged_attention",
            rows=group * mean,
            head_dim=self.cache.head_dim,
            query_bytes=query.element_size(),
            kv_bytes=self.cache.keys.element_size(),
        )
        if config["BLOCK_M"] >= group:
            return config
        tiles = {**dict(config.tiles), "BLOCK_M": triton.next_power_of_2(group)}
        return replace(config, tiles=tuple(tiles.items()))

    def _num_tiles(self, queries: int) -> int:
        """Bound the tiles: kernels of those that there are not end at once."""
        num_members = self.members.ids.shape[0]
        return num_members if self.members.single else self.members.num_queries // queries + num_members

    def _num_splits(self, num_tiles: int, config: LaunchConfig) -> int:
        max_keys = self.members.max_keys
        if self.call.split_keys:
            return max(1, -(-(max_keys or 0) // self.call.split_keys))
        wanted = config["PROGRAMS"] // max(1, num_tiles * self.cache.num_kv_heads)
        if max_keys is not None:
            wanted = min(wanted, max_keys // _MIN_SPLIT_KEYS)
        return max(1, min(wanted, _MAX_SPLITS))


def _ids_and_starts(ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return the ids and, behind them, the sums of their queries: [2 N + 1], int32."""
    return np.concatenate((ids, [0], np.cumsum(lengths[ids]))).astype(np.int32)


def _members(part: torch.Tensor, ids: NDArray[np.int64], batch: AttentionBatch) -> Members | None:
    if not len(ids):
        return None
    lengths = np.diff(batch.query_start)[ids]
    max_keys = int(batch.seq_lens[ids].max())
    if batch.window is not None:
        max_keys = min(max_keys, batch.window + int(lengths.max()))
    single = bool((lengths == 1).all())
    return Members(part[: len(ids)], part[len(ids) :], int(lengths.sum()), single, max_keys)


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
    for heads, head_dim, dtypes, params in (
        ((32, 8), 128, (torch.bfloat16, torch.bfloat16), plain),
        ((32, 8), 128, (torch.float16, torch.float16), plain),
        ((32, 8), 128, (torch.bfloat16, torch.float8_e4m3fn), plain),
        ((32, 8), 128, (torch.bfloat16, torch.int8), plain),
        ((64, 8), 64, (torch.bfloat16, torch.bfloat16), gpt_oss),
        ((16, 8), 256, (torch.bfloat16, torch.bfloat16), gemma),
        ((32, 32), 96, (torch.bfloat16, torch.bfloat16), plain),
        ((8, 1), 512, (torch.bfloat16, torch.bfloat16), plain),
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
